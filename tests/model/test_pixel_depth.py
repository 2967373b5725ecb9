"""Pictures of more than 8 bits: scaled by a stated bit depth or by what they hold, and said once."""

import io
import logging
import struct
import time

import numpy as np
import pytest
import torch
from PIL import Image

from gdino_hf.model import pixel_depth
from gdino_hf.model.image_processing_gdino import load_image
from picture_bytes import encoded, png16, tiff16

DEPTHS = (8, 10, 12, 14, 16)


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    pixel_depth._say_once.cache_clear()


def scene(depth, channels=3, size=(12, 20)):
    """Values of a bit depth that use its whole range, and the bytes they stand for."""
    values = np.random.default_rng(depth).integers(0, 2**depth, (*size, channels))
    values.flat[0] = 2**depth - 1
    return values, np.rint(values * 255 / (2**depth - 1)).astype(np.uint8)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_files_are_scaled_by_what_they_hold(depth, kind):
    values, expected = scene(depth, 1)
    data = encoded(Image.fromarray(values[..., 0].astype(np.uint16)), kind)
    for source in (data, Image.open(io.BytesIO(data))):
        assert np.array_equal(np.asarray(load_image(source))[..., 0], expected[..., 0])


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colour_pngs_are_scaled_by_what_they_hold(depth, channels):
    values, expected = scene(depth, channels)
    values[..., 3:] = 65535
    if channels == 2:
        values[..., 1] = 65535
        expected = expected[..., :1].repeat(3, -1)
    data = png16(values)
    # Pillow keeps the high byte of 16 bits, which rounds down.
    tolerance = 1 if depth == 16 else 0
    for source in (data, io.BytesIO(data), Image.open(io.BytesIO(data))):
        assert np.abs(np.asarray(load_image(source)).astype(int) - expected[..., :3]).max() <= tolerance


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize(("compression", "order"), [(1, "<"), (1, ">"), (8, "<"), (8, ">")])
def test_colour_tiffs_are_scaled_by_what_they_hold(depth, channels, compression, order):
    values, expected = scene(depth, channels)
    values[..., 3:] = 65535
    image = np.asarray(load_image(tiff16(values, compression, order)))
    assert np.abs(image.astype(int) - expected[..., :3]).max() <= (1 if depth == 16 else 0)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_are_scaled_by_what_they_hold(depth, channels):
    values, expected = scene(depth, channels)
    if channels == 4:
        values[..., 3] = 2**16 - 1 if depth < 16 else 0
    types = [
        np.uint16,
        np.int32,
        np.int64,
        np.float32,
        np.float64,
        *([np.int16] if depth < 16 and channels < 4 else []),
    ]
    for kind in types:
        assert np.array_equal(np.asarray(load_image(values.astype(kind)))[..., :channels], expected[..., :3]), kind
    assert np.array_equal(np.asarray(load_image(torch.from_numpy(values)))[..., :channels], expected[..., :3])


def test_a_uint16_array_of_byte_values_equals_the_uint8_one():
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 3))
    assert np.array_equal(load_image(values.astype(np.uint16)), load_image(values.astype(np.uint8)))
    assert np.array_equal(load_image(values.astype(np.int16)), load_image(values.astype(np.uint8)))


def test_a_stated_bit_depth_decides(monkeypatch):
    dark = np.full((4, 4), 100, dtype=np.uint16)
    sources = [dark, np.dstack([dark] * 3), dark.astype(np.float32), encoded(Image.fromarray(dark), "PNG")]
    sources += [png16(np.dstack([dark] * 3)), tiff16(np.dstack([dark] * 3)), Image.fromarray(dark)]
    for source in sources:
        assert load_image(source).getpixel((1, 1)) == (100,) * 3
        assert load_image(source, bit_depth=12).getpixel((1, 1)) == (round(100 * 255 / 4095),) * 3
        assert load_image(source, bit_depth=16).getpixel((1, 1)) == (0,) * 3
    monkeypatch.setenv("GDINO_BIT_DEPTH", "12")
    assert load_image(dark).getpixel((1, 1)) == (6,) * 3
    # Pictures of 8 bits have their depth.
    assert load_image(dark.astype(np.uint8)).getpixel((1, 1)) == (100,) * 3
    for source in sources:
        with pytest.raises(ValueError, match=r"pixels up to 100, but 6 bits hold at most 63"):
            load_image(source, bit_depth=6)


@pytest.mark.parametrize("depth", [0, 33, 1.5, True, "twelve"])
def test_an_impossible_bit_depth_is_refused(depth):
    with pytest.raises(ValueError, match="is not a whole number from 1 to 32"):
        load_image(np.zeros((2, 2), dtype=np.uint16), bit_depth=depth)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[-1, 5]], dtype=np.int16), "must not be negative, got -1 to 5"),
        (np.array([[70_000, 5]], dtype=np.int32), "0..65535, got up to 70000"),
        (np.array([[-0.5, 5]], dtype=np.float32), "must not be negative"),
        (np.array([[1e6, 5]], dtype=np.float32), "0..65535, got up to 1e[+]06"),
        (np.array([[np.inf, 5]], dtype=np.float32), "not finite"),
    ],
)
def test_values_beyond_16_bits_are_refused_in_arrays_and_files(values, message):
    sources = [values] if values.dtype == np.int16 else [values, Image.fromarray(values)]
    for source in sources:
        with pytest.raises(ValueError, match=message):
            load_image(source)


def test_a_depth_that_a_file_states_is_kept():
    """A PGM's largest value is in its header, however dark the picture is."""
    assert load_image(b"P5 2 1 4095\n" + struct.pack(">2H", 400, 200)).getpixel((0, 0)) == (25,) * 3


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("is_stated", [True, False])
def test_binary_ppms_are_scaled_by_their_header_or_by_what_they_hold(depth, channels, is_stated):
    values, expected = scene(depth, channels)
    largest = 2**depth - 1 if is_stated else 65535
    pixels = values.astype(">u2" if largest > 255 else "u1").tobytes()
    data = b"P%d 20 12 %d\n" % (5 if channels == 1 else 6, largest) + pixels
    assert np.array_equal(np.asarray(load_image(data))[..., :channels], expected)
    with pytest.raises(ValueError, match="cannot be decoded"):
        load_image(data[:-9])


def test_a_ppm_of_16_bits_takes_no_longer_than_other_pictures():
    data = b"P6 1500 1000 65535\n" + bytes(9_000_000)
    begin = time.thread_time()
    assert load_image(data, bit_depth=16).size == (1500, 1000)
    assert time.thread_time() - begin < 1


def test_each_depth_is_said_once(caplog):
    twelve, ten = scene(12, 1)[0].astype(np.uint16), scene(10, 1)[0].astype(np.uint16)
    with caplog.at_level(logging.WARNING):
        for values in (twelve, twelve, ten, encoded(Image.fromarray(twelve[..., 0]), "PNG"), scene(16)[0]):
            load_image(values)
    assert [record.getMessage().split("values of ")[1][:7] for record in caplog.records] == ["12 bits", "10 bits"]
    assert all("bit_depth=" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float32, np.uint16])
def test_full_range_and_bytes_are_not_mentioned(kind, caplog):
    load_image(scene(16 if kind is np.uint16 else 8)[0].astype(kind))
    assert caplog.records == []


@pytest.mark.parametrize("dtype", ["complex64", "datetime64[s]", "U3", "O"])
def test_arrays_that_hold_no_real_numbers_are_refused(dtype):
    with pytest.raises((TypeError, ValueError), match="must be integers, floats or booleans"):
        load_image(np.zeros((8, 8, 3), dtype))


@pytest.mark.parametrize("depth", [5, 9, 11, 12, 13, 15])
def test_colours_of_any_stated_depth_are_scaled_and_checked_band_by_band(depth, monkeypatch):
    monkeypatch.setattr(pixel_depth, "_BAND", 400)
    values = np.random.default_rng(depth).integers(0, 2**depth, (40, 30, 4)).astype(np.uint16)
    # Transparency uses all of its bits and is no colour.
    values[..., 3] = 65535
    pixels = np.asarray(load_image(png16(values), bit_depth=depth))
    assert np.array_equal(pixels, np.rint(values[..., :3] * (255 / (2**depth - 1))).astype(np.uint8))
    values[-1, -1, 0] = 2**depth
    with pytest.raises(ValueError, match=f"{depth} bits hold at most {2**depth - 1}"):
        load_image(png16(values), bit_depth=depth)
