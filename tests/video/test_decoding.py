"""Frames and times of video files of many kinds, and one sentence for those that are damaged or no videos."""

import av
import numpy as np
import pytest
from PIL import Image

from gdino_hf.video.decoding import VideoError, VideoFile
from gdino_hf.video.frame_sources import open_source
from video_clips import flat_frames, number_of, turn, write_clip, write_sound

CORNER = (250, 20, 20)


def numbers(frames):
    return [number_of(frame.image) for frame in frames]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h264.mp4", {}),
        ("h264.mkv", {}),
        ("h264.mov", {}),
        ("stream.ts", {}),
        ("hevc10.mp4", {"codec": "libx265", "pixels": "yuv420p10le", "options": {"x265-params": "log-level=none"}}),
        ("av1.mp4", {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "lp=1"}}),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime"}}),
        ("old.avi", {"codec": "mpeg4"}),
        ("moving.gif", {"codec": "gif", "pixels": "rgb8"}),
        ("lossless.mkv", {"codec": "ffv1", "pixels": "yuv444p"}),
    ],
)
def test_every_kind_of_file_gives_its_frames_and_times(tmp_path, name, options):
    size = (64, 64)
    path = write_clip(tmp_path / name, flat_frames(8, size), **options)
    source = VideoFile(path)
    frames = list(source)
    if name == "moving.gif":
        # GIF has 8 bits for all three colours.
        reds = [np.asarray(frame.image)[..., 0].mean() for frame in frames]
        assert len(frames) == 8
        assert reds == sorted(reds)
        assert reds[0] < reds[-1]
    else:
        assert numbers(frames) == list(range(8))
    assert [frame.number for frame in frames] == list(range(8))
    # AVI and MPEG-TS count time in frames or from an arbitrary start.
    assert np.diff([frame.seconds for frame in frames]) == pytest.approx([0.1] * 7, abs=0.011)
    assert frames[0].seconds == pytest.approx(0, abs=0.11)
    assert {frame.image.size for frame in frames} == {size}
    assert source.rate == pytest.approx(10, rel=0.05)
    assert source.remark is None


def test_odd_sizes_keep_every_pixel(tmp_path):
    path = write_clip(tmp_path / "odd.mkv", flat_frames(3, (63, 47)), codec="ffv1", pixels="bgr0")
    assert [frame.image.size for frame in VideoFile(path)] == [(63, 47)] * 3


def test_variable_frame_rates_keep_their_presentation_times(tmp_path):
    times = [0.0, 0.04, 0.5, 0.52, 2.0, 2.25]
    for name in ("vfr.mp4", "vfr.mkv"):
        path = write_clip(tmp_path / name, flat_frames(6), times=times)
        frames = list(VideoFile(path))
        assert numbers(frames) == list(range(6))
        assert [frame.seconds for frame in frames] == pytest.approx(times, abs=2e-3)


@pytest.mark.parametrize(
    ("matrix", "size", "corner"),
    [
        ((1, 0, 0, 1), (64, 48), (0, 0)),
        ((0, 1, -1, 0), (48, 64), (1, 0)),
        ((-1, 0, 0, -1), (64, 48), (1, 1)),
        ((0, -1, 1, 0), (48, 64), (0, 1)),
        ((-1, 0, 0, 1), (64, 48), (1, 0)),
        ((0, 1, 1, 0), (48, 64), (0, 0)),
    ],
    ids=["as stored", "90 degrees", "180 degrees", "270 degrees", "mirrored", "mirrored, 90 degrees"],
)
def test_videos_of_phones_are_turned_upright(tmp_path, matrix, size, corner):
    image = Image.new("RGB", (64, 48), (20, 20, 20))
    image.paste(CORNER, (0, 0, 32, 24))
    frames = list(VideoFile(turn(write_clip(tmp_path / "phone.mp4", [image] * 3), matrix)))
    assert len(frames) == 3
    for frame in frames:
        assert frame.image.size == size
        red = np.asarray(frame.image, dtype=float)[..., 0]
        halves = [np.array_split(half, 2, axis=1) for half in np.array_split(red, 2)]
        quarters = {(right, below): halves[below][right].mean() for right in (0, 1) for below in (0, 1)}
        assert max(quarters, key=quarters.get) == corner
        assert quarters[corner] > 150


def test_a_part_of_a_video_keeps_numbers_and_times(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", flat_frames(10))
    source = VideoFile(path, start=0.3, end=0.7)
    frames = list(source)
    assert [frame.number for frame in frames] == [3, 4, 5, 6]
    assert [frame.seconds for frame in frames] == pytest.approx([0.3, 0.4, 0.5, 0.6])
    assert source.expected == 4
    assert source.remark is None


def noise(count):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv"])
def test_a_truncated_video_gives_the_frames_so_far_and_one_sentence(tmp_path, name):
    options = {"movflags": "+faststart"} if name.endswith("mp4") else {}
    path = write_clip(tmp_path / name, noise(30), container=options)
    whole = [np.asarray(frame.image) for frame in VideoFile(path)]
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    source = VideoFile(path)
    frames = list(source)
    assert 10 < len(frames) < 22
    # All but the last are those of the whole file.
    for frame, expected in zip(frames[:-1], whole, strict=False):
        assert np.array_equal(np.asarray(frame.image), expected)
    assert source.remark is not None
    assert source.remark.count(". ") == 0
    assert "cut off or damaged after 1." in source.remark


def test_a_video_cut_off_before_its_index_is_refused_in_one_sentence(tmp_path):
    path = write_clip(tmp_path / "cut.mp4", noise(20))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match=r"cut\.mp4 cannot be opened as a video .*cut off"):
        VideoFile(path)


def test_damaged_packets_in_the_middle_do_not_end_a_video(tmp_path):
    path = write_clip(tmp_path / "holes.ts", noise(30), gop=1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 188 * 20] = bytes(188 * 20)
    path.write_bytes(data)
    frames = list(VideoFile(path))
    assert len(frames) >= 25
    assert frames[-1].seconds == pytest.approx(2.9, abs=0.05)


def test_parts_in_one_file_follow_each_other(tmp_path):
    """Recorders put parts of a video into one file, each with a clock of its own."""
    part = write_clip(tmp_path / "part.ts", flat_frames(10), gop=1).read_bytes()
    (tmp_path / "whole.ts").write_bytes(part + part)
    seconds = [frame.seconds for frame in VideoFile(tmp_path / "whole.ts")]
    # The packet at the seam may be taken for a damaged one.
    assert len(seconds) >= 19
    assert all(0.08 < step < 0.22 for step in np.diff(seconds))


def test_frames_that_an_edit_list_hides_are_not_missed(tmp_path):
    path = write_clip(tmp_path / "long.mp4", flat_frames(20), gop=20)
    with av.open(str(path)) as source, av.open(str(tmp_path / "trimmed.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                shift = round(1 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    source = VideoFile(tmp_path / "trimmed.mp4")
    assert [number_of(frame.image) for frame in source] == [number % 12 for number in range(10, 20)]
    assert source.remark is None


def test_damage_before_the_end_that_was_asked_for_is_told(tmp_path):
    path = write_clip(tmp_path / "holes.avi", noise(20), codec="mjpeg", pixels="yuvj420p")
    data = bytearray(path.read_bytes())
    third = [place for place in range(len(data)) if data[place : place + 4] == b"00dc"][3]
    size = int.from_bytes(data[third + 4 : third + 8], "little")
    data[third + 8 : third + 8 + size] = bytes(size)
    path.write_bytes(data)
    source = VideoFile(path, end=1.5)
    list(source)
    assert source.remark == f"{path}: 1 damaged frames were left out; {source_frames(path)} were read."


def source_frames(path):
    return len(list(VideoFile(path, end=1.5)))


def test_a_start_after_the_end_is_refused_in_one_sentence(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", flat_frames(10))
    with pytest.raises(VideoError, match=r"clip\.mp4 ends after 1\.0 seconds; give a start before, not 5"):
        list(VideoFile(path, start=5.0))


def test_pictures_in_an_unknown_codec_are_refused_in_one_sentence(tmp_path):
    path = write_clip(tmp_path / "odd.mp4", flat_frames(3))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(VideoError, match=r"odd\.mp4 has pictures in a codec that is unknown here; save it as MP4"):
        VideoFile(path)


@pytest.mark.parametrize(
    ("options", "message"), [({"start": 1.0}, "start is 1, but a stream"), ({"rate": 5}, "rate is")]
)
def test_streams_have_neither_start_nor_rate(options, message):
    with pytest.raises(ValueError, match=message):
        open_source("rtsp://127.0.0.1:1/camera", **options)


def test_a_video_has_its_own_rate(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", flat_frames(3))
    with pytest.raises(ValueError, match="rate is 5, but a video tells its own; leave it out"):
        open_source(path, rate=5)


@pytest.mark.parametrize(("name", "cover"), [("tone.m4a", False), ("tone.mp3", False), ("cover.mp3", True)])
def test_sound_alone_is_refused_in_one_sentence(tmp_path, name, cover):
    path = write_sound(tmp_path / name, cover)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == cover
    with pytest.raises(VideoError, match=f"{name} has only sound in it and no pictures; give a video"):
        VideoFile(path)


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"only words",
        b"",
        b"\0\0\0\x18ftypisom" + bytes(100),
        b"\x1aE\xdf\xa3" + bytes(100),
        b"1\n00:00:01,000 --> 00:00:02,000\nsubtitles\n",
    ],
    ids=["play list", "concat", "text", "empty", "mp4 head alone", "webm head alone", "subtitles"],
)
@pytest.mark.parametrize("ending", ["mp4", "txt", "m3u8"])
def test_files_that_are_no_videos_are_refused_in_one_sentence(tmp_path, data, ending):
    path = tmp_path / f"it.{ending}"
    path.write_bytes(data)
    with pytest.raises(VideoError, match=rf"it\.{ending} ") as error:
        list(VideoFile(path))
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_a_play_list_opens_no_other_file(tmp_path):
    write_clip(tmp_path / "part.ts", flat_frames(3))
    path = tmp_path / "list.m3u8"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\npart.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(VideoError):
        list(VideoFile(path))


def test_folders_and_lists_of_pictures_are_read_as_frames(tmp_path):
    for number in (0, 2, 10, 9, 1):
        flat_frames(11)[number].save(tmp_path / f"frame{number}.png")
    source = open_source(tmp_path, rate=5)
    frames = list(source)
    assert numbers(frames) == [0, 1, 2, 9, 10]
    assert [frame.seconds for frame in frames] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert source.expected == 5
    assert source.remark is None
    assert numbers(open_source(iter(flat_frames(4)), rate=10, start=0.1, end=0.3)) == [1, 2]


def test_pictures_that_cannot_be_read_are_left_out_and_told_of(tmp_path):
    for number, image in enumerate(flat_frames(3)):
        image.save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    source = open_source(tmp_path)
    assert [frame.number for frame in source] == [0, 2]
    assert "left out" in source.remark
    (tmp_path / "0.png").write_bytes(b"no picture")
    (tmp_path / "2.png").write_bytes(b"no picture")
    with pytest.raises(VideoError, match="no picture can be read"):
        list(open_source(tmp_path))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"start": -1}, "start is -1"),
        ({"start": 3, "end": 2}, "end is 2"),
        ({"rate": 0}, "rate is 0"),
        ({"rate": float("nan")}, "rate is nan"),
    ],
)
def test_options_out_of_their_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_source([], **options)


def test_sources_of_other_types_are_refused(tmp_path):
    with pytest.raises(TypeError, match="for one picture call the detector"):
        open_source(Image.new("RGB", (8, 8)))
    with pytest.raises(TypeError, match="got int"):
        open_source(3)
    with pytest.raises(VideoError, match="folder without pictures"):
        open_source(tmp_path)
    with pytest.raises(VideoError, match=r"missing\.mp4 cannot be read \(No such file"):
        open_source(tmp_path / "missing.mp4")
    with pytest.raises(VideoError, match="no camera 99"):
        open_source("webcam:99")
