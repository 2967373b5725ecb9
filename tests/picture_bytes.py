"""Small picture files for tests: written by Pillow, and by hand where Pillow cannot write them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def smooth(height=40, width=60):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 4, columns * 3, (rows + columns) * 2], -1).clip(0, 255).astype(np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth=8, colour=0, pixels=b""):
    """A PNG with a given size in its header, whatever its pixel data."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def png16(values):
    """A PNG of 16 bits with 1 to 4 channels; Pillow cannot write colours of 16 bits."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], zlib.compress(rows, 1))


def tiff16(values, compression=1, order="<"):
    """A TIFF of 16 bits with 3 or 4 channels in one strip, plain or deflated (8)."""
    height, width, channels = values.shape
    pixels = values.astype(f"{order}u2").tobytes()
    pixels = zlib.compress(pixels) if compression == 8 else pixels
    entries = [
        *((256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, 8), (259, 3, 1, compression), (262, 3, 1, 2)),
        *((273, 4, 1, 16), (277, 3, 1, channels), (278, 4, 1, height), (279, 4, 1, len(pixels))),
        *([(338, 3, 1, 2)] if channels == 4 else []),
    ]
    start = struct.pack(f"{order}2sHI4H", b"II" if order == "<" else b"MM", 42, 16 + len(pixels), *[16] * 4)
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        short = kind == 3 and count == 1
        directory += struct.pack(f"{order}HHI", tag, kind, count)
        directory += struct.pack(f"{order}HH" if short else f"{order}I", *([value, 0] if short else [value]))
    return start + pixels + directory + bytes(4)


def many_scans(scans, size=(64, 64)):
    data = encoded(Image.new("RGB", size, (90, 100, 110)), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + scans * last + data[-2:]


def qoi(width, height):
    """A black QOI picture of single pixels, each a code of one byte."""
    return b"qoif" + struct.pack(">IIBB", width, height, 3, 0) + b"\xc0" * (width * height) + b"\0" * 7 + b"\1"
