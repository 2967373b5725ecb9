"""Claims about the metadata of pictures: they may hold a bounded number of numbers, whatever the format."""

import struct
import time

import numpy as np
import pytest
from PIL import Image

from gdino_hf.model.picture_files import open_picture, read_header
from gdino_hf.model.picture_limits import PictureError
from gdino_hf.model.picture_metadata import MOST_NUMBERS, has_many_numbers
from picture_bytes import chunk, encoded, smooth

ORIENTATION, RESOLUTION, UNKNOWN = 0x0112, 282, 60000


def directory(tag, count, held=None):
    """EXIF with one tag of so many fractions, of which `held` are in the file."""
    held = count if held is None else held
    return b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", tag, 5, count, 26) + bytes(4) + b"\1\0\0\0" * (2 * held)


def with_exif(kind, exif):
    data = encoded(Image.fromarray(smooth()), kind, **({"exif": exif} if kind == "WEBP" else {}))
    if kind == "PNG":
        return data[:33] + chunk(b"eXIf", exif) + data[33:]
    if kind == "JPEG":
        # Pillow joins the parts of long EXIF.
        parts = [b"Exif\0\0" + exif[at : at + 65_000] for at in range(0, len(exif), 65_000)]
        return data[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in parts) + data[2:]
    return data


def tiff(tag, count):
    entries = [(256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8)]
    listed = b"".join(struct.pack("<HHII", name, 4, 1, value) for name, value in entries)
    at = 8 + 2 + 12 * 9 + 4
    own = struct.pack("<HHII", tag, 5, count, at)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 9) + listed + own + bytes(4) + bytes(8 * count)


@pytest.mark.parametrize("read", [open_picture, read_header])
@pytest.mark.parametrize("tag", [ORIENTATION, UNKNOWN])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_millions_of_numbers_are_refused_at_once(kind, tag, read):
    data = tiff(tag, 2_000_000) if kind == "TIFF" else with_exif(kind, directory(tag, 2_000_000))
    start = time.process_time()
    with pytest.raises(PictureError, match=r"500,000 numbers in its metadata.*save it again without them"):
        read(data)
    assert time.process_time() - start < 4


@pytest.mark.parametrize("order", ["<", ">"])
def test_numbers_are_counted_in_both_kinds_of_tiff(order):
    mark, many = (b"II" if order == "<" else b"MM"), MOST_NUMBERS + 1
    plain = mark + struct.pack(f"{order}HIHHHII", 42, 8, 1, RESOLUTION, 5, many, 26)
    big = mark + struct.pack(f"{order}HHHQQHHQQ", 43, 8, 0, 16, 1, RESOLUTION, 5, many, 44)
    for head in (plain, big):
        assert has_many_numbers(head + bytes(8 * many))
        assert not has_many_numbers(head.replace(struct.pack(f"{order}I", many), struct.pack(f"{order}I", 3)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_count_does_not_keep_a_picture_from_being_read(kind):
    found = open_picture(with_exif(kind, directory(UNKNOWN, 2**32 - 1, held=10)))
    assert np.asarray(found).shape == smooth().shape
