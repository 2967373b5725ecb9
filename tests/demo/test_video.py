"""Reading and writing videos, and files that only look like videos."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from gdino_demo import video as module
from gdino_demo.safety import Refused
from gdino_demo.video import Reader, Writer
from gradio_client import handle_file
from PIL import Image

# Error of a flat colour after H.264, whose chroma planes have half the size.
CODEC_ROUNDING = 12


def shade(number):
    return (20 * number % 256, 100, 200)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Ten frames of flat colours at ten frames a second."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    writer = Writer(path, Fraction(10))
    for number in range(10):
        writer.add(Image.new("RGB", (64, 48), shade(number)))
    writer.close()
    return path


def test_frames_come_with_their_number_and_time(clip):
    reader = Reader(str(clip), 3)
    frames = list(reader)
    assert [frame.number for frame in frames] == [0, 3, 6, 9]
    assert [frame.seconds for frame in frames] == pytest.approx([0.0, 0.3, 0.6, 0.9], abs=1e-3)
    assert (reader.rate, reader.expected, reader.stopped) == (10, 4, False)
    for frame in frames:
        assert frame.image.size == (64, 48)
        mean = np.asarray(frame.image, dtype=float).mean((0, 1))
        assert np.abs(mean - shade(frame.number)).max() < CODEC_ROUNDING


def test_reading_stops_at_the_largest_number_of_frames(clip, monkeypatch):
    monkeypatch.setattr(module, "MOST_FRAMES", 4)
    reader = Reader(str(clip), 2)
    assert len(list(reader)) == 4
    assert reader.stopped


def test_written_videos_have_a_codec_that_browsers_play(clip):
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name in ("h264", "mpeg4")
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(container.duration / av.time_base) == pytest.approx(1.0, abs=0.11)


CORNER = (250, 20, 20)


def phone_video(path, matrix):
    """A video of 64x48 pixels that is dark but for its top left quarter, with the display matrix that phones write."""
    image = Image.new("RGB", (64, 48), (20, 20, 20))
    image.paste(CORNER, (0, 0, 32, 24))
    writer = Writer(path, Fraction(10))
    for _ in range(4):
        writer.add(image)
    writer.close()
    data = path.read_bytes()
    header = data.index(b"tkhd") + 4
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = data.index(identity, header)
    xx, xy, yx, yy = matrix
    turned = struct.pack(">9i", xx << 16, xy << 16, 0, yx << 16, yy << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data[:place] + turned + data[place + 36 :])
    return path


@pytest.mark.parametrize(
    ("matrix", "size", "corner", "rotation"),
    [
        ((1, 0, 0, 1), (64, 48), (0, 0), 0),
        ((0, 1, -1, 0), (48, 64), (1, 0), -90),
        ((-1, 0, 0, -1), (64, 48), (1, 1), 180),
        ((0, -1, 1, 0), (48, 64), (0, 1), 90),
        ((-1, 0, 0, 1), (64, 48), (1, 0), None),
        ((0, 1, 1, 0), (48, 64), (0, 0), None),
    ],
    ids=["as stored", "90 degrees", "180 degrees", "270 degrees", "mirrored", "mirrored, 90 degrees"],
)
def test_phone_videos_are_turned_upright(tmp_path, matrix, size, corner, rotation):
    path = phone_video(tmp_path / "phone.mp4", matrix)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        # PyAV 14 has no such attribute.
        assert rotation is None or (getattr(frame, "rotation", rotation) - rotation) % 360 == 0
    frames = list(Reader(str(path), 1))
    assert len(frames) == 4
    for frame in frames:
        assert frame.image.size == size
        pixels = np.asarray(frame.image, dtype=float)
        quarters = {
            (right, below): pixels[
                below * size[1] // 2 : (below + 1) * size[1] // 2, right * size[0] // 2 : (right + 1) * size[0] // 2, 0
            ].mean()
            for right in (0, 1)
            for below in (0, 1)
        }
        assert max(quarters, key=quarters.get) == corner
        assert quarters[corner] > 150


def test_odd_frame_sizes_are_made_even(tmp_path):
    writer = Writer(tmp_path / "odd.mp4", Fraction(1, 100))
    writer.add(Image.new("RGB", (63, 47)))
    writer.close()
    assert next(iter(Reader(str(tmp_path / "odd.mp4"), 1))).image.size == (62, 46)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "not a video"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a video"),
        (b"only words", "not a video"),
        (b"", "not a video"),
        (b"\0\0\0\x18ftypisom" + bytes(100), "damaged|no pictures"),
        (b"\x1aE\xdf\xa3" + bytes(100), "damaged|no pictures"),
    ],
    ids=["play list", "concat", "text", "empty", "mp4 head alone", "webm head alone"],
)
def test_files_that_are_not_videos_are_refused(tmp_path, data, sentence):
    path = tmp_path / "it.mp4"
    path.write_bytes(data)
    with pytest.raises(Refused, match=sentence):
        list(Reader(str(path), 1))


def test_a_truncated_video_gives_its_readable_frames(tmp_path):
    path = tmp_path / "broken.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), dtype=np.uint8)
    writer = Writer(path, Fraction(10))
    for pixels in noise:
        writer.add(Image.fromarray(pixels))
    writer.close()
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)
    assert 0 < len(list(Reader(str(path), 1))) <= 20


def test_the_api_returns_the_detections_of_every_frame(client, example_folder, tmp_path):
    path = tmp_path / "cat.mp4"
    writer = Writer(path, Fraction(10))
    with Image.open(example_folder / "cat.jpg") as cat:
        for _ in range(5):
            writer.add(cat)
    writer.close()
    found = client.predict(video=handle_file(path), labels="cat", stride=2, api_name="/video")
    assert [frame["frame"] for frame in found["frames"]] == [0, 2, 4]
    assert [frame["seconds"] for frame in found["frames"]] == pytest.approx([0, 0.2, 0.4], abs=1e-3)
    assert all(frame["detections"][0]["label"] == "cat" for frame in found["frames"])
    assert (found["width"], found["height"]) == (450, 300)
