"""Checks of pictures and file names, before any model runs."""

import io
import struct
import zlib

import numpy as np
import pytest
from gdino_demo import safety
from gdino_demo.safety import Refused, plain_name, read_picture
from PIL import Image


def png(width, height, pixels=b""):
    """A PNG with a given size in its header, whatever its pixel data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def photograph():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_picture_keeps_its_pixels_and_its_file(photograph):
    data = encoded(photograph, "PNG")
    picture = read_picture(data, "C:\\photos\\a.png")
    assert np.array_equal(picture.image, photograph)
    assert (picture.data, picture.name) == (data, "a.png")


def test_a_rotated_photograph_is_turned_upright(photograph):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    picture = read_picture(encoded(photograph, "JPEG", exif=exif, quality=95))
    assert picture.image.size == photograph.size[::-1]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (png(60_000, 60_000, zlib.compress(b"\0" * 1000)), "million; make it smaller"),
        (png(8_000, 8_000, zlib.compress(b"\0" * 1000)), "8000 x 8000 pixels; a picture may have 40 million"),
        (png(100, 100, b"no pixels"), "damaged"),
        (b"these are only words", "not a picture that can be read"),
        (b"", "is empty (0 bytes); get the picture again"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"  \n<svg onload='alert(1)'></svg>", "SVG"),
        (
            b"\x89PNG\r\n\x1a\n" + b"\0" * safety.LARGEST_PICTURE,
            "more than 20 MB, the limit of a picture; make it smaller",
        ),
    ],
    ids=["bomb", "64 million", "damaged", "text", "empty", "svg", "svg without head", "21 MB"],
)
def test_files_that_are_not_pictures_are_refused_in_one_sentence(data, sentence):
    with pytest.raises(Refused) as refusal:
        read_picture(data, "it.png")
    message = refusal.value.message
    assert sentence in message
    assert message.startswith("it.png")
    assert "\n" not in message


def test_a_jpeg_of_a_thousand_scans_is_refused_before_it_is_decoded(photograph):
    data = encoded(photograph, "JPEG", progressive=True)
    assert read_picture(data).image.size == photograph.size
    last = data[data.rfind(b"\xff\xda") : -2]
    with pytest.raises(Refused, match="more than 100 scans"):
        read_picture(data[:-2] + 1000 * last + data[-2:], "it.jpg")


def test_the_formats_are_those_of_the_package(photograph):
    for kind in ("TIFF", "TGA", "PPM", "JPEG2000"):
        assert read_picture(encoded(photograph, kind)).image.mode == "RGB"
    for kind in ("EPS", "PDF", "IM"):
        with pytest.raises(Refused, match=r"not a picture|not read here"):
            read_picture(encoded(photograph, kind))


def test_pixels_that_mean_nothing_are_refused_in_one_sentence():
    data = encoded(Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)), "TIFF")
    with pytest.raises(Refused, match=r"it.tif cannot be used: .* not finite"):
        read_picture(data, "it.tif")


def test_a_file_that_was_removed_is_named(tmp_path):
    with pytest.raises(Refused, match="no longer kept"):
        read_picture(tmp_path / "gone.png", "gone.png")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("<img src=x>.png", "_img src=x_.png"),
        ("..", "picture"),
        ("x" * 300, "x" * 80),
        ("Žluťoučký kůň.jpg", "Žluťoučký kůň.jpg"),
        ("cafe\u0301 & R+D, #1's.jpg", "cafe\u0301 & R+D, #1's.jpg"),
        ("कुत्ता 😀.png", "कुत्ता 😀.png"),
        ("a\u202egnp.exe", "a_gnp.exe"),
    ],
)
def test_file_names_hold_no_path_and_no_markup(name, shown):
    assert plain_name(name) == shown


def test_refusals_escape_markup():
    assert Refused("the label '<b>' of R&D is none").message == "the label '&lt;b&gt;' of R&D is none"
