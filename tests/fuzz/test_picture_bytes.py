"""Seeded mutations of picture files: whatever is in them, reading ends in a picture or in one sentence.

`pytest -m fuzz tests/fuzz` reads all 2,000 files; without it, a few of each format are read.
"""

from __future__ import annotations

import importlib.util
import random
import resource
import struct
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from gdino_hf.model.picture_files import read_header
from gdino_hf.model.picture_limits import PictureError
from gdino_hf.model.picture_pixels import load_image
from picture_bytes import chunk, encoded, many_scans, png, png16, qoi, smooth, tiff16

FILES, FEW = 2000, 120
SECONDS, BYTES = 10.0, 2**30
PNG_START = 8
EXTREMES = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\0\0\xff\xff", b"\x80\0\0\0")


def icon(content, side=0):
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", side, side, 0, 0, 1, 32, len(content), 22) + content


def originals():
    """Return whole files of every format, in the variants that have their own decoders."""
    image = Image.fromarray(smooth(48, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = smooth(20, 30).astype(np.uint16) << 4
    text = " ".join(map(str, smooth(12, 16).ravel())).encode()
    files = [
        *(encoded(image, "JPEG", exif=exif, progressive=progressive) for progressive in (False, True)),
        *(encoded(image.convert("CMYK"), kind) for kind in ("JPEG", "TIFF")),
        encoded(image, "MPO", save_all=True, append_images=[image]),
        many_scans(30),
        encoded(image, "PNG", exif=exif),
        *(encoded(image.convert(mode), "PNG") for mode in ("RGBA", "LA", "L", "1", "P")),
        encoded(image, "PNG", save_all=True, append_images=[image.rotate(90)]),
        *(png16(deep[..., :channels]) for channels in (1, 2, 3)),
        *(encoded(image, "WEBP", lossless=lossless, exif=exif) for lossless in (False, True)),
        encoded(image, "WEBP", save_all=True, append_images=[image.rotate(90)]),
        encoded(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        *(encoded(image.convert(mode), "BMP") for mode in ("RGB", "P", "1")),
        *(encoded(image, "TIFF", compression=name) for name in (None, "tiff_lzw", "jpeg", "tiff_adobe_deflate")),
        encoded(image.convert("1"), "TIFF", compression="group4"),
        *(tiff16(deep, compression) for compression in (1, 8)),
        *(encoded(image.convert(mode), "JPEG2000") for mode in ("RGB", "L")),
        encoded(image, "JPEG2000", irreversible=True, no_jp2=True),
        *(encoded(image.convert(mode), "PPM") for mode in ("RGB", "L", "1")),
        *(b"P%d 16 12 255 " % kind + text for kind in (2, 3)),
        b"P1 16 12 " + b"0 1 " * 96,
        encoded(Image.fromarray(np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)), "TIFF"),
        *(encoded(image, "TGA", compression=name) for name in (None, "tga_rle")),
        icon(encoded(image, "PNG")),
        encoded(Image.fromarray(smooth(48, 48)), "ICO", sizes=[(48, 48)], bitmap_format="bmp"),
        encoded(image, "PCX"),
        encoded(image, "SGI"),
        qoi(16, 12),
    ]
    if importlib.util.find_spec("PIL.AvifImagePlugin"):
        files.append(encoded(image, "AVIF", exif=exif))
    return files


def with_checksums(data):
    """Return a PNG with the right checksums of its chunks, so that decoders read what was changed in them."""
    pieces, at = [data[:PNG_START]], PNG_START
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        content = data[at + 4 : at + 8 + length]
        pieces.append(struct.pack(">I", length) + content + struct.pack(">I", zlib.crc32(content)))
        at += 12 + length
    return b"".join([*pieces, data[at:]])


def change_bytes(data, other, rng):
    for _ in range(rng.choice((1, 2, 8, 64))):
        data[rng.randrange(rng.choice((64, 300, len(data))) % len(data) or 1)] = rng.randrange(256)
    return data


def put_extreme(data, other, rng):
    """Overwrite numbers such as sizes and offsets, most of which stand at the start."""
    for _ in range(rng.choice((1, 2))):
        at = rng.randrange(min(len(data), rng.choice((40, 200, 1000))))
        width = rng.choice((1, 2, 4))
        data[at : at + width] = rng.choice(EXTREMES)[:width]
    return data


def cut(data, other, rng):
    return data[: rng.randrange(len(data))]


def remove(data, other, rng):
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 4, 100))]
    return data


def repeat(data, other, rng):
    at = rng.randrange(len(data))
    piece = bytes(data[at : at + rng.choice((1, 12, 200))])
    return data[:at] + piece * rng.choice((2, 50, 2000)) + data[at:]


def splice(data, other, rng):
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def insert_noise(data, other, rng):
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.choice((1, 30, 3000))) + data[at:]


CHANGES = (change_bytes, change_bytes, put_extreme, put_extreme, cut, remove, repeat, splice, insert_noise)


def bombs():
    """Return small files that ask for much, as they were reported."""
    yield png(13_300, 13_300, 16, 0, zlib.compress(bytes(2 * 13_300 * 2000), 9))
    yield png(8_900, 8_900, 8, 2, zlib.compress(bytes(10_000_000), 9))
    yield many_scans(1000, (2000, 2000))
    yield many_scans(80, (4000, 4000))
    yield (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0))
        + chunk(b"tEXt", b"") * 300_000
    )
    yield b"P3 1200 1200 255 " + b"1 " * 1_000_000
    yield b"P1 1200 1200 " + b"#" * 3_000_000
    yield qoi(1200, 1200)
    yield b"\xff\xd8" + b"\xff\xfe\0\x02" * 400_000 + b"\xff\xd9"
    yield (
        b"GIF89a"
        + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
        + b","
        + struct.pack("<HHHHB", 0, 0, 9, 9, 0)
        + b"\2\0;"
    )


def mutated(seed, files):
    rng = random.Random(seed)
    data = bytearray(files[seed % len(files)])
    is_png = data.startswith(b"\x89PNG")
    for _ in range(rng.choice((1, 1, 2, 4))):
        if data:
            data = rng.choice(CHANGES)(data, bytearray(rng.choice(files)), rng)
    return with_checksums(bytes(data)) if is_png and rng.random() < 0.7 else bytes(data)


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def outcome(read, data):
    """Return the result of a reader, or None and its ValueError."""
    with warnings.catch_warnings():
        # Pillow warns of metadata that is damaged.
        warnings.simplefilter("ignore")
        try:
            return read(data), None
        except ValueError as error:
            return None, error


def read_files(files):
    """Read files one after the other; return how many were pictures."""
    pictures, before = 0, peak_memory()
    for number, data in enumerate(files):
        begin = time.thread_time()
        for read in (load_image, read_header):
            result, error = outcome(read, data)
            if error is None:
                pictures += read is load_image and result.mode == "RGB" and min(result.size) > 0
                continue
            message = str(error)
            assert isinstance(error, PictureError) or message.startswith(("The picture", "Pixels")), number
            assert message.isprintable(), number
            assert message.endswith("."), number
            assert len(message) < 600, number
        assert time.thread_time() - begin < 2 * SECONDS, number
        assert peak_memory() - before < BYTES, number
    return pictures


def test_whole_files_are_pictures():
    files = originals()
    assert read_files(files) == len(files)


@pytest.mark.slow
def test_files_that_ask_for_much_end_within_the_limits():
    read_files(bombs())


def test_a_few_mutated_files_are_pictures_or_one_sentence():
    files = originals()
    assert read_files(mutated(seed, files) for seed in range(FEW)) > 0


@pytest.mark.fuzz
def test_all_mutated_files_are_pictures_or_one_sentence():
    files = originals()
    pictures = read_files(mutated(seed, files) for seed in range(FILES))
    # Mutations must neither leave every file readable nor stop every decoder at its first bytes.
    assert 0.1 < pictures / FILES < 0.9
