"""Annotated videos that play, with times and sound of their source, also if the process was killed."""

import signal
import struct
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from gdino_hf.video.decoding import VideoFile
from gdino_hf.video.video_writing import VideoWriter
from video_clips import flat_frames, number_of, write_clip


def copy(source, target, **options):
    """Write the frames of a video anew."""
    opened = VideoFile(source)
    writer = VideoWriter(target, opened.rate, sound=opened, **options)
    for frame in opened:
        writer.add(frame.image, frame.seconds)
    writer.close()
    return target


def sound_of(path):
    """Times in seconds and the number of samples of the decoded sound."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None
        frames = [(frame.time, frame.samples / frame.sample_rate) for frame in container.decode(audio=0)]
    return frames[0][0], sum(length for _, length in frames)


def outer_boxes(data):
    """Names of the outermost boxes of an MP4 file."""
    names, place = [], 0
    while place < len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        names.append(name)
        place += struct.unpack_from(">Q", data, place + 8)[0] if length == 1 else length
    return names


def test_times_of_a_variable_rate_are_kept(tmp_path):
    times = [0.0, 0.04, 0.5, 0.52, 2.0, 2.25]
    target = copy(write_clip(tmp_path / "vfr.mp4", flat_frames(6), times=times), tmp_path / "copy.mp4")
    frames = list(VideoFile(target))
    assert [frame.seconds for frame in frames] == pytest.approx(times, abs=2e-3)
    assert [number_of(frame.image) for frame in frames] == list(range(6))


def test_files_have_a_codec_that_browsers_play_and_are_plain_when_closed(tmp_path):
    target = copy(write_clip(tmp_path / "clip.mp4", flat_frames(35)), tmp_path / "copy.mp4")
    with av.open(str(target)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name in ("h264", "mpeg4")
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.frames == 35
        assert float(container.duration / av.time_base) == pytest.approx(3.5, abs=0.11)
    # What is left of the fragments lies in the data, which players do not read as boxes.
    assert outer_boxes(target.read_bytes()) == [b"ftyp", b"free", b"mdat", b"moov"]


@pytest.mark.parametrize(
    ("name", "codec"), [("clip.mp4", "aac"), ("clip.mkv", "aac"), ("clip.mkv", "pcm"), ("s.ts", "aac")]
)
def test_sound_lies_beside_the_frames(tmp_path, name, codec):
    source = write_clip(tmp_path / name, flat_frames(20), sound=codec == "aac")
    if codec == "pcm":
        with av.open(str(source), "w") as output:
            stream = output.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            tone = output.add_stream("pcm_s16le", rate=16000, layout="mono")
            for image in flat_frames(20):
                output.mux(stream.encode(av.VideoFrame.from_image(image)))
            output.mux(stream.encode())
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 32000), dtype=np.int16), format="s16", layout="mono")
            samples.sample_rate = 16000
            output.mux([*tone.encode(samples), *tone.encode()])
    target = copy(source, tmp_path / "copy.mp4")
    start, length = sound_of(target)
    expected_start, expected = sound_of(source)
    with av.open(str(source)) as container:
        expected_start -= (container.start_time or 0) / av.time_base
    assert start == pytest.approx(expected_start, abs=0.07)
    assert length == pytest.approx(expected, abs=0.1)
    assert length == pytest.approx(2.0, abs=0.2)


def test_a_part_of_a_video_begins_at_zero_with_its_sound(tmp_path):
    source = VideoFile(write_clip(tmp_path / "clip.mp4", flat_frames(12), sound=True), start=0.4, end=0.9)
    writer = VideoWriter(tmp_path / "part.mp4", source.rate, sound=source, start=source.start)
    for frame in source:
        writer.add(frame.image, frame.seconds)
    writer.close(whole=False)
    assert [frame.seconds for frame in VideoFile(tmp_path / "part.mp4")] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    start, length = sound_of(tmp_path / "part.mp4")
    assert start == pytest.approx(0, abs=0.07)
    assert length == pytest.approx(0.5, abs=0.13)


def test_a_part_that_begins_between_two_frames_keeps_its_frames_beside_the_sound(tmp_path):
    times = [0.0, 0.1, 0.7, 0.8, 0.9]
    source = write_clip(tmp_path / "source.mp4", flat_frames(5), times=times, sound=True, rate=4)
    part = VideoFile(source, start=0.3)
    writer = VideoWriter(tmp_path / "out.mp4", part.rate, sound=part, start=0.3)
    for frame in part:
        writer.add(frame.image, frame.seconds)
    writer.close()
    with av.open(str(tmp_path / "out.mp4")) as container:
        shown = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
    assert shown == pytest.approx([0.4, 0.5, 0.6], abs=0.001)
    with av.open(str(tmp_path / "out.mp4")) as container:
        heard = next(container.decode(audio=0))
        assert float(heard.pts * heard.time_base) < 0.1


def test_odd_sizes_repeat_their_edge_and_other_sizes_are_resized(tmp_path):
    writer = VideoWriter(tmp_path / "odd.mp4", 10)
    pixels = np.full((47, 63, 3), 40, dtype=np.uint8)
    pixels[-1], pixels[:, -1] = 200, 200
    writer.add(Image.fromarray(pixels), 0.0)
    writer.add(Image.new("RGB", (30, 90), (40, 40, 40)), 0.1)
    writer.close()
    first, second = VideoFile(tmp_path / "odd.mp4")
    assert first.image.size == second.image.size == (64, 48)
    shown = np.asarray(first.image, dtype=float)
    assert shown[-1].mean() > 150 > 80 > shown[:40, :40].mean()


def test_times_that_do_not_grow_are_pushed_apart(tmp_path):
    writer = VideoWriter(tmp_path / "still.mp4", 10)
    for image, seconds in zip(flat_frames(4), (0.0, 0.0, 0.0, 0.3), strict=True):
        writer.add(image, seconds)
    writer.close()
    assert [number_of(frame.image) for frame in VideoFile(tmp_path / "still.mp4")] == [0, 1, 2, 3]


def test_sound_in_an_unknown_codec_is_left_out_and_told(tmp_path):
    path = write_clip(tmp_path / "odd.mkv", flat_frames(8), sound=True)
    path.write_bytes(path.read_bytes().replace(b"A_AAC", b"A_ZZZ"))
    source = VideoFile(path)
    frames = list(source)
    writer = VideoWriter(tmp_path / "out.mp4", 10, sound=source)
    with pytest.warns(UserWarning, match="odd.mkv has sound in a codec that is unknown here; the annotated video has"):
        writer.add(frames[0].image, frames[0].seconds)
    for frame in frames[1:]:
        writer.add(frame.image, frame.seconds)
    writer.close()
    assert len(list(VideoFile(tmp_path / "out.mp4"))) == 8
    assert not VideoFile(tmp_path / "out.mp4").has_sound


def test_a_video_without_frames_is_no_file(tmp_path):
    VideoWriter(tmp_path / "none.mp4", 10).close()
    assert not (tmp_path / "none.mp4").exists()


WRITES_FOREVER = """
import sys
from PIL import Image
from gdino_hf.video.video_writing import VideoWriter
writer = VideoWriter(sys.argv[1], 10)
number = 0
while True:
    writer.add(Image.new("RGB", (64, 48), (20 * (number % 12), 100, 200)), number / 10)
    number += 1
    print(number, flush=True)
"""


@pytest.mark.parametrize("frames", [25, 47])
def test_a_killed_process_leaves_a_video_that_plays(tmp_path, frames):
    target = tmp_path / "killed.mp4"
    process = subprocess.Popen([sys.executable, "-c", WRITES_FOREVER, str(target)], stdout=subprocess.PIPE, text=True)
    while int(process.stdout.readline()) < frames:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    read = list(VideoFile(target))
    # All but the fragment that was being written and what the encoder held.
    assert len(read) >= frames - 25
    assert [number_of(frame.image) for frame in read] == [number % 12 for number in range(len(read))]
    assert Path(target).stat().st_size > 0
