"""Uploaded videos: their frames, their tracks with the code of `gdino track`, limits, and files that are no videos."""

import csv
import json
import re

import numpy as np
import pytest
from gdino_demo import tracked_video as module
from gdino_demo.engine import Models
from gdino_demo.outputs import Settings
from gdino_demo.queries import read_query
from gdino_demo.safety import Refused
from gdino_demo.tracked_video import found_in_frames, track_video
from gdino_demo.video import UploadedVideo
from gradio_client import handle_file
from PIL import Image

from gdino_hf import Detector
from gdino_hf.cli import main
from gdino_hf.video.decoding import VideoFile
from video_clips import flat_frames, number_of, turn, write_clip

THRESHOLD, NMS, EVERY = 0.2, 0.5, 3
# The command may run passes side by side, which changes the last digits of boxes in pixels.
ROUNDING = 0.05


def moving_cat(example_folder, number=7):
    """Frames over which a photograph of a cat moves to the right."""
    frames = []
    with Image.open(example_folder / "cat.jpg") as cat:
        small = cat.resize((240, 160))
    for place in range(number):
        frames.append(Image.new("RGB", (320, 200), (120, 140, 120)))
        frames[-1].paste(small, (6 * place, 10))
    return frames


@pytest.fixture(scope="module")
def clip(tmp_path_factory, example_folder):
    return write_clip(tmp_path_factory.mktemp("clip") / "cat.mp4", moving_cat(example_folder), sound=True)


@pytest.fixture(scope="module")
def models():
    return Models({"nano": Detector("nano", device="cpu")})


def run(models, path, folder, every=EVERY, **options):
    return track_video(
        models, "nano", str(path), read_query("cat, cup"), Settings(THRESHOLD, NMS), every, folder, **options
    )


def test_frames_come_with_their_number_and_time_upright_and_bounded(tmp_path):
    path = turn(write_clip(tmp_path / "phone.mp4", flat_frames(6, (2000, 500))), (0, 1, -1, 0))
    frames = list(UploadedVideo(str(path)))
    assert [(frame.number, number_of(frame.image)) for frame in frames] == [(number, number) for number in range(6)]
    assert [frame.seconds for frame in frames] == pytest.approx([number / 10 for number in range(6)], abs=1e-3)
    assert {frame.image.size for frame in frames} == {(320, 1280)}


def test_the_files_are_those_of_gdino_track(models, clip, tmp_path):
    mine, own = tmp_path / "page", tmp_path / "command"
    mine.mkdir()
    forwards, told = models.forwards, []
    tracked = run(models, clip, mine, progress=lambda *numbers: told.append(numbers))
    assert models.forwards == forwards + 3
    assert told == [(number, 7) for number in range(1, 8)]
    options = ["--every", str(EVERY), "--threshold", str(THRESHOLD), "--nms", str(NMS), "--device", "cpu"]
    assert main(["track", str(clip), "--labels", "cat, cup", *options, "--out", str(own)]) == 0
    for name in ("frames.jsonl", "tracks.txt", "tracks.csv", "tracks.coco.json"):
        pieces = [re.split(r"(-?\d+\.\d+)", (folder / name).read_text()) for folder in (mine, own)]
        assert pieces[0][::2] == pieces[1][::2]
        numbers = [[float(number) for number in each[1::2]] for each in pieces]
        assert numbers[0] == pytest.approx(numbers[1], abs=ROUNDING)
    assert [frame.seconds for frame in VideoFile(mine / "annotated.mp4")] == [
        frame.seconds for frame in VideoFile(own / "annotated.mp4")
    ]
    assert VideoFile(mine / "annotated.mp4").has_sound
    assert tracked.remarks == ()
    assert [(row["track_id"], row["label"]) for row in tracked.summary["tracks"]] == [(1, "cat")]
    assert next(csv.DictReader((mine / "tracks.csv").open()))["frames"] == "4"
    assert str(tmp_path) not in (mine / "summary.json").read_text()


def test_what_takes_too_long_is_cut_off_and_said(models, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_WORK", 0.0)
    tracked = run(models, clip, tmp_path, every=1)
    assert tracked.summary["finished"] is False
    assert (
        tracked.summary["frames"] == len(found_in_frames(tmp_path)) == len(list(VideoFile(tmp_path / "annotated.mp4")))
    )
    assert tracked.summary["frames"] < 7
    (remark,) = tracked.remarks
    assert remark.startswith("The first 0:00 of 0:00 were searched, because one request takes 0 seconds of work")
    assert json.loads((tmp_path / "summary.json").read_text())["remarks"] == [remark]


def test_a_video_longer_than_the_limit_is_cut_off_and_said(models, tmp_path, example_folder):
    frames = moving_cat(example_folder, 4)
    path = write_clip(tmp_path / "long.mp4", frames, times=[0, 1800, 3599, 7200], sound=True)
    tracked = run(models, path, tmp_path, every=1)
    assert [row["frame"] for row in found_in_frames(tmp_path)] == [0, 1, 2]
    assert len(tracked.remarks) == 1
    assert tracked.remarks[0].startswith("The first 60:00 of ")


def test_larger_frames_and_damage_are_said(models, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (12, 36, 1284, 3), dtype=np.uint8)
    path = write_clip(tmp_path / "cut.mkv", map(Image.fromarray, noise), codec="ffv1", pixels="bgr0")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    tracked = run(models, path, tmp_path, every=12, draw=False)
    assert tracked.size == (1280, 36)
    smaller, damage = tracked.remarks
    assert smaller == ("The frames were made smaller, to 1280x36 pixels; the boxes in all files are in these pixels.")
    assert damage.startswith("cut.mkv is cut off or damaged after")
    assert not (tmp_path / "annotated.mp4").exists()


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
        list(UploadedVideo(str(path)))


def test_a_video_without_a_readable_frame_is_refused(models, tmp_path):
    path = write_clip(tmp_path / "broken.mp4", flat_frames(6))
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    end = data.index(b"moov", start) - 4
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    with pytest.raises(Refused, match="damaged"):
        run(models, path, tmp_path)


def test_the_api_returns_tracks_and_the_detections_of_every_frame(client, clip):
    found = client.predict(video=handle_file(clip), labels="cat", stride=3, api_name="/video")
    assert [frame["frame"] for frame in found["frames"]] == list(range(7))
    assert [frame["detected"] for frame in found["frames"]] == [number % 3 == 0 for number in range(7)]
    assert [[each["track_id"] for each in frame["detections"]] for frame in found["frames"]] == [[]] * 3 + [[1]] * 4
    assert (found["width"], found["height"], found["source"]) == (320, 200, "cat.mp4")
    assert [track["label"] for track in found["tracks"]] == ["cat"]
