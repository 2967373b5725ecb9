"""Opening picture files: one list of formats, recognized by content, and limits of pixels, bytes, time and memory."""

import importlib
import io
import pickle
import struct
import subprocess
import sys
import textwrap
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from gdino_hf.model.image_processing_gdino import load_image
from gdino_hf.model.picture_files import open_picture, read_header
from gdino_hf.model.picture_formats import FORMAT_NAMES, PICTURE_SUFFIXES, foreign_format, picture_format
from gdino_hf.model.picture_limits import MEGAPIXEL, PEAK_BYTES_PER_PIXEL, PictureError, PictureLimits
from picture_bytes import chunk, encoded, many_scans, png, png16, qoi, smooth

SMALL = PictureLimits(pixels=10_000, bytes=100_000, seconds=5)


PICTURES = {
    **{kind: {} for kind in ("PNG", "BMP", "TIFF", "PPM", "TGA", "ICO", "PCX", "SGI")},
    "JPEG": {"quality": 95, "subsampling": 0},
    "MPO": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
    "JPEG2000": {},
    "AVIF": {"quality": 95},
    "GIF": {},
}


@pytest.fixture(scope="module", params=PICTURES)
def picture(request):
    """Name, content and pixels of a small picture in one format."""
    kind = request.param
    if kind == "AVIF" and importlib.util.find_spec("PIL.AvifImagePlugin") is None:
        pytest.skip("this Pillow has no AVIF")
    pixels = smooth(48, 48) if kind == "ICO" else smooth()
    options = {"sizes": [(48, 48)]} if kind == "ICO" else PICTURES[kind]
    image = Image.fromarray(pixels)
    if kind == "MPO":
        options = {**options, "save_all": True, "append_images": [image]}
    return kind, encoded(image, kind, **options), pixels


def test_every_format_is_read_whatever_its_name(picture, tmp_path):
    kind, data, pixels = picture
    for name in ("photo.jpg", "photo.png", "photo", "photo.txt"):
        (tmp_path / name).write_bytes(data)
        image = load_image(tmp_path / name)
        assert image.mode == "RGB"
        # GIF has 256 colours; the others are lossless or of high quality.
        assert np.abs(np.asarray(image).astype(int) - pixels).mean() <= (6 if kind in ("GIF", "AVIF") else 2)


def test_formats_are_recognized_by_content(picture):
    kind, data, _ = picture
    assert picture_format(data[:64], data[-26:]) == ("JPEG" if kind == "MPO" else kind)
    assert foreign_format(data[:64]) is None


def test_the_list_names_endings_that_cameras_and_tools_write():
    assert set(PICTURE_SUFFIXES) >= {".jpe", ".jfif", ".avif", ".jp2", ".ppm", ".heic", ".mpo", ".tga", ".ico", ".webp"}
    assert {"EPS", "WMF", "XPM", "XBM", "FITS", "HDF5", "PSD"}.isdisjoint(FORMAT_NAMES)


def test_old_tga_files_have_no_signature():
    image = Image.fromarray(smooth())
    data = encoded(image, "TGA")[:-26]
    assert picture_format(data[:64], data[-26:]) == "TGA"
    assert picture_format(data[:64], data[-26:], guess=False) is None
    assert np.array_equal(load_image(data), image)


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 20
%%EndComments
(run.txt) (w) file (written) writestring
showpage
%%EOF
"""


@pytest.fixture
def watched():
    """List of the processes started and the files written, as Python's own audit events tell."""
    events = []

    def watch(event, arguments):
        if not active:
            return
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes or event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
            events.append((event, arguments))

    active = [True]
    sys.addaudithook(watch)
    yield events
    active.clear()


def test_an_eps_named_png_starts_no_program_and_writes_no_file(tmp_path, watched):
    path = tmp_path / "x.png"
    path.write_bytes(EPS)
    watched.clear()
    for source in (path, EPS, io.BytesIO(EPS), Image.open(io.BytesIO(EPS))):
        with pytest.raises(ValueError, match=r"EPS|PostScript"):
            load_image(source)
    assert watched == []
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<svg/>', "an SVG drawing"),
        (b"8BPS\0\1" + bytes(40), "a Photoshop document"),
        (b'/* XPM */\nstatic char *x[] = {"1 1 1 1"};', "an XPM picture"),
        (b"\xff\x0a" + bytes(40), "a JPEG XL picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "an EPS"),
        (b"", "is empty"),
        (b"only words", "is not a picture"),
        (b"\0\0\0\x18ftypisom" + bytes(40), "is not a picture"),
        (b"%PDF-1.7\n", "is not a picture"),
    ],
)
def test_what_is_not_in_the_list_is_refused_by_name(data, what, tmp_path):
    path = tmp_path / "it.jpg"
    path.write_bytes(data)
    with pytest.raises(PictureError, match=what) as refusal:
        load_image(path)
    message = str(refusal.value)
    assert "it.jpg" in message
    assert message.endswith(".")
    assert "\n" not in message


def test_an_icon_with_a_bitmap_of_os2_is_within_the_limits():
    """Its sides are two bytes each; read as four, they would be a billion pixels."""
    bitmap = struct.pack("<IHHHH", 12, 16, 32, 1, 24) + bytes(16 * 16 * 3 + 16 * 4)
    icon = b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 24, len(bitmap), 22) + bitmap
    assert load_image(icon).size == (16, 16)


def test_heic_without_its_decoder_says_what_to_install(monkeypatch):
    # None makes an import fail as if the package were not installed.
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(
        PictureError, match=r'HEIC picture; reading it needs pillow-heif: pip install "gdino-hf\[heic\]"'
    ):
        load_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))


def test_heic_is_read_where_its_decoder_is_installed():
    heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    heif.from_pillow(Image.fromarray(smooth(64, 96))).save(buffer, quality=95)
    image = load_image(buffer.getvalue())
    assert np.abs(np.asarray(image).astype(int) - smooth(64, 96)).mean() < 4


@pytest.mark.parametrize("side", [13_300, 60_000])
@pytest.mark.parametrize("depth", [1, 8, 16])
def test_too_many_pixels_are_refused_before_decoding(side, depth):
    data = png(side, side, depth, 0, zlib.compress(bytes(1000)))
    begin = time.thread_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = Image.open(io.BytesIO(data)) if side < 13_377 else data
    for source in (data, opened):
        with pytest.raises(PictureError, match=rf"{side} x {side} pixels; .* 80 million.*GDINO_MAX_MEGAPIXELS"):
            load_image(source)
    assert time.thread_time() - begin < 1


def test_a_picture_of_200_megapixels_is_read_if_the_limit_allows_it():
    """One bit per pixel keeps the test quick; Pillow's own limit is 179 million."""
    width, height = 20_000, 10_001
    data = png(width, height, 1, 0, zlib.compress(bytes((width // 8 + 1) * height)))
    image = open_picture(data, PictureLimits(pixels=201 * MEGAPIXEL, seconds=60))
    assert image.size == (width, height)


@pytest.mark.parametrize(("kind", "share"), [("PNG", 1), ("JPEG2000", 0.25), ("WEBP", 0.6)])
def test_the_remedy_names_the_limit_that_allows_the_picture(kind, share, monkeypatch):
    data = encoded(Image.new("RGB", (1300, 1000)), kind)
    with pytest.raises(PictureError) as refusal:
        load_image(data, limits=PictureLimits(pixels=MEGAPIXEL // 10))
    needed = -int(-1.3 // share)
    assert f"--max-megapixels {needed}, GDINO_MAX_MEGAPIXELS={needed} or PictureLimits(pixels={needed}_000_000)" in str(
        refusal.value
    )
    monkeypatch.setenv("GDINO_MAX_MEGAPIXELS", str(needed))
    assert load_image(data).size == (1300, 1000)


def test_the_pictures_inside_an_icon_count():
    inner = png(9_000, 9_000, 8, 0, zlib.compress(bytes(1000)))
    bitmap = struct.pack("<IiiHHIIiiII", 40, 20_000, 20_000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(100)
    old_bitmap = struct.pack("<IHHHH", 12, 60_000, 60_000, 1, 24) + bytes(100)
    for content in (inner, bitmap, old_bitmap):
        icon = b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(content), 22) + content
        with pytest.raises(PictureError, match="million"):
            load_image(icon)


def test_too_many_bytes_are_refused(tmp_path):
    data = encoded(Image.fromarray(smooth()), "PNG")
    path = tmp_path / "large.png"
    path.write_bytes(data + bytes(SMALL.bytes))
    for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        with pytest.raises(PictureError, match=r"more than 0\.0953674 MB"):
            load_image(source, limits=SMALL)
    assert load_image(path).size == (60, 40)


def test_a_jpeg_of_a_thousand_scans_is_refused_at_once():
    data = many_scans(1000, (2000, 2000))
    begin = time.thread_time()
    for source in (data, Image.open(io.BytesIO(data))):
        with pytest.raises(PictureError, match="more than 100 scans"):
            load_image(source)
    assert time.thread_time() - begin < 2
    assert load_image(many_scans(80)).size == (64, 64)


def test_what_follows_a_jpeg_is_not_counted_as_scans():
    """Phones append videos to photographs, in which any two bytes may stand."""
    data = encoded(Image.fromarray(smooth()), "JPEG") + b"\xff\xda" * 1000
    assert load_image(data).size == (60, 40)


@pytest.mark.parametrize("kind", ["P3", "P2", "QOI"])
def test_formats_decoded_slowly_may_have_fewer_pixels(kind):
    side = 2000
    data = qoi(side, side) if kind == "QOI" else f"{kind} {side} {side} 255\n".encode() + b"0 " * 100
    for source in (data, Image.open(io.BytesIO(data))):
        with pytest.raises(PictureError, match=r"of its format may have 1\.6 million"):
            load_image(source)


@pytest.mark.parametrize("share", [0.35, 0.75])
def test_the_limit_of_time_is_that_of_both_decodings_of_16_bits_and_of_joining_them(share):
    # Colours of 16 bits that use fewer are decoded twice, which takes most of the time.
    data = png16(np.full((1600, 1600, 4), 900, dtype=np.uint16))
    load_image(data)
    begin = time.thread_time()
    load_image(data)
    whole = time.thread_time() - begin
    with pytest.raises(PictureError, match=r"takes more than [\d.]+ seconds to decode"):
        load_image(data, limits=PictureLimits(seconds=share * whole))


def test_decoding_stops_after_the_limit_of_time():
    side = 1000
    begin = time.thread_time()
    for data in (qoi(side, side), b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)) + chunk(b"teXt", b"") * 200_000):
        with pytest.raises(PictureError, match=r"takes more than 0\.2 seconds to decode"):
            load_image(data, limits=PictureLimits(seconds=0.2))
    assert time.thread_time() - begin < 2


def test_a_header_is_read_within_the_same_limits(picture, tmp_path):
    _, data, pixels = picture
    path = tmp_path / "it"
    path.write_bytes(data)
    for source in (path, data, io.BytesIO(data)):
        assert read_header(source) == ((pixels.shape[1], pixels.shape[0]), 1)
        with pytest.raises(PictureError, match="pixels; a picture"):
            read_header(source, PictureLimits(pixels=100))
    for wrong in (EPS, b"", data[:9]):
        path.write_bytes(wrong)
        with pytest.raises(PictureError, match=r"^it "):
            read_header(path, name="it")
    with pytest.raises(PictureError, match="There is no file absent"):
        read_header(tmp_path / "absent", name="absent")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_turned_upright_once(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(smooth()), kind, exif=exif)
    assert read_header(data) == ((60, 40), 6)
    once = load_image(data)
    assert once.size == load_image(once).size == (40, 60)


def test_limits_come_from_the_environment(monkeypatch):
    data = encoded(Image.new("L", (200, 100)), "PNG")
    monkeypatch.setenv("GDINO_MAX_MEGAPIXELS", "0.01")
    with pytest.raises(PictureError, match=r"may have 0.01 million"):
        load_image(data)
    monkeypatch.setenv("GDINO_MAX_MEGAPIXELS", "250")
    monkeypatch.setenv("GDINO_MAX_MEGABYTES", "0.5")
    monkeypatch.setenv("GDINO_MAX_SECONDS", "3")
    assert PictureLimits.current() == PictureLimits(250 * MEGAPIXEL, 2**19, 3.0)
    assert load_image(data).size == (200, 100)
    for wrong in ("many", "-1", "0", "nan", "inf"):
        monkeypatch.setenv("GDINO_MAX_MEGAPIXELS", wrong)
        with pytest.raises(ValueError, match=f"GDINO_MAX_MEGAPIXELS is '{wrong}'; it must be a positive number"):
            load_image(data)


def test_errors_travel_between_processes():
    with pytest.raises(PictureError) as refusal:
        open_picture(b"words", name="it.png")
    again = pickle.loads(pickle.dumps(refusal.value))
    assert (str(again), again.kind) == (str(refusal.value), "format")


def test_names_are_printed_without_escape_sequences(tmp_path):
    path = tmp_path / "a\x1b[2J\u202egnp.jpg"
    for data in (None, b"words", encoded(Image.fromarray(smooth()), "JPEG")[:300]):
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(PictureError) as refusal:
            load_image(path)
        assert str(refusal.value).isprintable()
        assert r"a\x1b[2J\u202egnp.jpg" in str(refusal.value)


def test_a_folder_in_place_of_a_picture_is_called_so(tmp_path):
    for read in (load_image, read_header):
        with pytest.raises(PictureError, match=f"{tmp_path.name} is a folder; name a picture in it"):
            read(tmp_path)


def test_peak_memory_is_what_the_limit_states(tmp_path):
    """Resident memory of a process that reads each format, measured above what it had before."""
    pixels = np.asarray(Image.fromarray(smooth()).resize((3000, 2000), Image.Resampling.BICUBIC))
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6
    for name, options in {
        "turned.jpg": {"progressive": True, "subsampling": 0, "quality": 95, "exif": exif},
        "turned.png": {"compress_level": 1, "exif": exif},
        "plain.tif": {},
        "plain.bmp": {},
    }.items():
        image.save(tmp_path / name, **options)
    image.convert("RGBA").save(tmp_path / "alpha.png", compress_level=1)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", progressive=True)
    deep = pixels.astype(np.uint16) * 257
    (tmp_path / "colour12.png").write_bytes(png16(deep >> 4))
    Image.fromarray(deep[..., 0]).save(tmp_path / "grey16.png", compress_level=1)
    Image.fromarray(deep[..., 0].astype(np.float32) / 65535).save(tmp_path / "float.tif")
    Image.fromarray(deep[..., 0].astype(np.int32)).save(tmp_path / "grey32.tif")
    script = """
        import os, resource, sys
        from pathlib import Path
        from gdino_hf.model.picture_formats import PICTURE_FORMATS, decoder
        from gdino_hf.model.picture_pixels import load_image
        for each in PICTURE_FORMATS:
            if each.plugin and each.name != "AVIF":
                decoder(each.name)
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        for path in sorted(Path(sys.argv[1]).iterdir()):
            if os.fork() == 0:
                before = peak()
                picture = load_image(path)
                used = peak() - before - path.stat().st_size
                print(path.name, used / (picture.width * picture.height), flush=True)
                os._exit(0)
            os.wait()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], capture_output=True, text=True, check=True
    )
    used = dict(line.split() for line in done.stdout.splitlines())
    assert len(used) == 10
    # 0.7 bytes per pixel, 4 MB, for the decoder's and Python's own buffers, which do not grow with the picture.
    assert {name: value for name, value in used.items() if float(value) > PEAK_BYTES_PER_PIXEL + 0.7} == {}


def test_very_narrow_pictures_count_as_wider_because_every_row_takes_memory():
    limits = PictureLimits(pixels=MEGAPIXEL)
    with pytest.raises(PictureError, match=r"has 1 x 200000 pixels, counted as 8 wide.*--max-megapixels 2"):
        open_picture(png(1, 200_000, 8, 0, zlib.compress(bytes(400_000))), limits)
    assert open_picture(png(200_000, 1, 8, 0, zlib.compress(bytes(200_001))), limits).size == (200_000, 1)


@pytest.mark.parametrize("read", [open_picture, read_header])
def test_large_files_of_formats_whose_decoders_cannot_be_stopped_are_refused(read):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8))
    data = encoded(noise, "JPEG2000")
    # Decoders read 2.5 MB a second at least, and this file has one.
    words = r"is a JPEG 2000 picture of 1 MB, which may take 1 seconds to decode, and 0.1 are.*--max-seconds 1"
    with pytest.raises(PictureError, match=words) as caught:
        read(data, PictureLimits(seconds=0.1))
    assert caught.value.kind == "time"
    read(data, PictureLimits(seconds=1))
