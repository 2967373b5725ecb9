"""gdino track: what it writes, what it refuses, and files that are whole whenever it is stopped."""

import csv
import json
import os
import re
import signal
import socket
import threading

import av
import numpy as np
import pytest
from PIL import Image

from fresh_python import COMMAND
from gdino_hf import Detections
from gdino_hf.cli import main
from gdino_hf.detection.coco_exchange import decode_masks
from gdino_hf.segmentation import Segmenter
from gdino_hf.video.decoding import VideoFile
from tiny_segmenters import save_segmenter, save_video_segmenter
from tracking_figures import photographs
from video_clips import CODEC_ROUNDING, write_clip

# Where the cat's box is, and where nothing is.
# Part of the pixels whose mask may change when a box is rounded to a hundredth of a pixel.
ROUNDED_PIXELS = 1e-3
LINE, ZONE = "300,0,300,200", "0,0,319,0,319,199,0,199"


@pytest.fixture(scope="module")
def frames():
    cat = photographs()[0].resize((240, 160))
    pictures = []
    for number in range(9):
        picture = Image.new("RGB", (320, 200), (120, 140, 120))
        picture.paste(cat, (6 * number, 10))
        pictures.append(picture)
    return pictures


@pytest.fixture(scope="module")
def clip(tmp_path_factory, frames):
    return write_clip(tmp_path_factory.mktemp("clip") / "cat.mp4", frames, sound=True)


@pytest.fixture(scope="module")
def out(tmp_path_factory, clip):
    folder = tmp_path_factory.mktemp("out")
    options = ["--labels", "cat", "--every", "2", "--count-line", LINE, "--count-zone", ZONE, "--device", "cpu"]
    assert main(["track", str(clip), *options, "--out", str(folder)]) == 0
    return folder


def rows(folder):
    return [json.loads(line) for line in (folder / "frames.jsonl").read_text().splitlines()]


def test_json_lines_have_every_frame(out):
    found = rows(out)
    assert [row["frame"] for row in found] == list(range(9))
    assert [row["seconds"] for row in found] == pytest.approx([number / 10 for number in range(9)], abs=1e-3)
    assert [row["detected"] for row in found] == [number % 2 == 0 for number in range(9)]
    assert all((row["width"], row["height"]) == (320, 200) for row in found)
    assert [[each["track_id"] for each in row["detections"]] for row in found] == [[], [], *[[1]] * 7]
    assert found[2]["detections"][0]["label"] == "cat"


def test_mot_lines_are_read_by_motmetrics(out):
    import motmetrics

    table = motmetrics.io.loadtxt(out / "tracks.txt", fmt="mot16")
    assert [frame for frame, _ in table.index] == list(range(3, 10))
    assert {number for _, number in table.index} == {1}
    assert set(table["ClassId"]) == {1}
    box = rows(out)[2]["detections"][0]["box"]
    first = table.iloc[0]
    # motmetrics counts pixels from 0, as boxes do.
    assert [first["X"], first["Y"]] == pytest.approx(box[:2], abs=0.01)
    assert [first["Width"], first["Height"]] == pytest.approx([box[2] - box[0], box[3] - box[1]], abs=0.02)


def test_coco_vid_is_complete_and_read_by_pycocotools(out):
    from pycocotools.coco import COCO

    content = json.loads((out / "tracks.coco.json").read_text())
    assert content["videos"] == [{"id": 1, "name": "cat.mp4", "width": 320, "height": 200, "fps": 10.0}]
    assert content["tracks"] == [{"id": 1, "category_id": 1, "video_id": 1}]
    assert [image["frame_id"] for image in content["images"]] == list(range(9))
    coco = COCO(str(out / "tracks.coco.json"))
    assert len(coco.getAnnIds()) == 7
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[3]))
    assert [each["track_id"] for each in annotations] == [1]
    x, y, width, height = annotations[0]["bbox"]
    assert [x, y, x + width, y + height] == pytest.approx(rows(out)[2]["detections"][0]["box"], abs=0.02)


def test_the_table_has_a_line_for_each_track(out):
    (row,) = csv.DictReader((out / "tracks.csv").open())
    scores = [each["score"] for line in rows(out) for each in line["detections"]]
    assert (row["track_id"], row["label"], row["first_frame"], row["last_frame"]) == ("1", "cat", "2", "8")
    assert (row["first_seconds"], row["last_seconds"], row["frames"]) == ("0.200", "0.800", "7")
    assert float(row["mean_score"]) == pytest.approx(sum(scores) / len(scores), abs=1e-3)


def test_the_annotated_video_has_all_frames_and_the_sound(out, frames):
    read = list(VideoFile(out / "annotated.mp4"))
    assert [frame.seconds for frame in read] == pytest.approx([number / 10 for number in range(9)], abs=1e-3)
    assert read[0].image.size == (320, 200)
    with av.open(str(out / "annotated.mp4")) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) / 16000 == pytest.approx(0.9, abs=0.15)


@pytest.mark.parametrize("tighten", [False, True])
def test_masks_are_drawn_and_in_json_lines_and_coco_vid(clip, out, tmp_path, tighten):
    from pycocotools.coco import COCO

    model = save_segmenter("sam2", tmp_path / "sam2")
    options = ["--labels", "cat", "--every", "2", "--device", "cpu", "--masks", str(model), "--out", str(tmp_path)]
    assert main(["track", str(clip), *options, *["--tighten"] * tighten]) == 0
    segmenter, with_masks = Segmenter(model, device="cpu"), 0
    coco = COCO(str(tmp_path / "tracks.coco.json"))
    plain = {row["frame"]: row for row in rows(out)}
    for row, frame in zip(rows(tmp_path), VideoFile(clip), strict=True):
        for each in row["detections"]:
            assert ("mask" in each) == row["detected"]
            if not row["detected"]:
                continue
            with_masks += 1
            (own,) = plain[row["frame"]]["detections"]
            found = Detections([own["box"]], [own["score"]], [0], ["cat"], frame.image.size)
            expected = segmenter(frame.image, found)
            mask = decode_masks([each["mask"]], frame.image.size)
            assert (mask != expected.masks).mean() < ROUNDED_PIXELS
            box = expected.tightened().boxes[0] if tighten else own["box"]
            assert each["box"] == pytest.approx(list(box), abs=1)
            (annotation,) = coco.loadAnns(coco.getAnnIds(imgIds=[row["frame"] + 1]))
            assert (coco.annToMask(annotation) == mask[0]).all()
            assert annotation["area"] == mask.sum()
    assert with_masks == 4
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["masks"], summary["tighten"]) == (str(model), tighten)
    drawn, without = (
        [np.asarray(frame.image, dtype=float) for frame in VideoFile(folder / "annotated.mp4")]
        for folder in (tmp_path, out)
    )
    mask = decode_masks([rows(tmp_path)[4]["detections"][0]["mask"]], (320, 200))[0]
    # The other video has a line and its count in it, at the edge.
    changes = np.abs(drawn[4] - without[4]).mean(-1)[20:150, 60:240]
    inside = mask[20:150, 60:240]
    assert changes[inside].mean() > CODEC_ROUNDING > changes[~inside].mean()


def test_a_model_follows_objects_and_makes_masks_in_every_frame(clip, tmp_path, capsys):
    # With these random weights, masks fill half of a frame or more; with others they are empty between detections.
    model = str(save_video_segmenter(tmp_path / "sam2", seed=1))
    options = ["--labels", "cat", "--every", "3", "--device", "cpu", "--tracker", model, "--batch", "1"]
    assert main(["track", str(clip), *options, "--out", str(tmp_path / "whole")]) == 0
    whole = rows(tmp_path / "whole")
    assert [row["detected"] for row in whole] == [True, False, False] * 3
    found = [each for row in whole for each in row["detections"]]
    assert all("mask" in each and each["track_id"] == 1 for each in found)
    assert any(row["detections"] for row in whole if not row["detected"])
    options += ["--state", str(tmp_path / "state.json"), "--no-video"]
    assert main(["track", str(clip), *options, "--end", "0.6", "--out", str(tmp_path / "first")]) == 0
    assert main(["track", str(clip), *options, "--start", "0.6", "--out", str(tmp_path / "second")]) == 0
    halves = [row["detections"] for name in ("first", "second") for row in rows(tmp_path / name)]
    assert halves == [row["detections"] for row in whole]
    assert "goes on with its own tracker" not in capsys.readouterr().err


def test_counts_and_settings_are_in_the_summary(out):
    summary = json.loads((out / "summary.json").read_text())
    assert summary["finished"] is True
    assert summary["remark"] is None
    assert (summary["frames"], summary["labels"], summary["tracker"]) == (9, ["cat"], "bytetrack")
    assert summary["counts"]["zones"][0]["objects"] == 1
    assert summary["counts"]["lines"][0]["in"] == summary["counts"]["lines"][0]["out"] == 0


def test_the_table_is_printed(clip, tmp_path, capsys):
    options = ["--labels", "cat", "--every", "4", "--no-video", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["track", str(clip), *options]) == 0
    printed = capsys.readouterr().out
    assert "track  label  first" in printed
    assert "1 track in 9 frames" in printed
    assert not (tmp_path / "annotated.mp4").exists()


def test_a_state_goes_on_with_the_same_ids(clip, tmp_path, capsys):
    options = ["--labels", "cat", "--every", "2", "--no-video", "--device", "cpu", "--state", str(tmp_path / "state")]
    assert main(["track", str(clip), *options, "--end", "0.6", "--out", str(tmp_path / "1")]) == 0
    assert main(["track", str(clip), *options, "--start", "0.6", "--out", str(tmp_path / "2")]) == 0
    assert [row["frame"] for row in rows(tmp_path / "1") + rows(tmp_path / "2")] == list(range(9))
    assert {each["track_id"] for row in rows(tmp_path / "2") for each in row["detections"]} == {1}
    assert all(row["detections"] for row in rows(tmp_path / "2"))
    assert "its own tracker" not in capsys.readouterr().err
    others = ["--tracker", "ocsort", "--start", "0.8", "--out", str(tmp_path / "3")]
    assert main(["track", str(clip), *options, *others]) == 0
    assert "goes on with its own tracker, bytetrack, and its threshold, 0.3" in capsys.readouterr().err


def test_a_damaged_video_has_results_one_sentence_and_status_1(clip, tmp_path, capsys, frames):
    path = write_clip(tmp_path / "cut.mkv", frames, codec="ffv1", pixels="bgr0")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    options = ["--labels", "cat", "--every", "5", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["track", str(path), *options]) == 1
    assert "cut off or damaged after" in capsys.readouterr().err
    assert 3 < len(rows(tmp_path / "out")) < 9
    assert len(list(VideoFile(tmp_path / "out" / "annotated.mp4"))) == len(rows(tmp_path / "out"))


@pytest.mark.parametrize(
    ("source", "options", "sentence"),
    [
        ("missing.mp4", [], r"missing\.mp4 cannot be read \(No such file or directory\)"),
        ("words.mp4", [], r"words\.mp4 cannot be opened as a video"),
        ("empty", [], "folder without pictures"),
        ("webcam:99", [], "no camera 99"),
        ("clip", ["--every", "500"], "--every 500 is too much"),
        ("clip", ["--count-line", "1,2,3,4,5,6"], "--count-line takes two points"),
        ("clip", ["--count-line", "1,2,3"], "is no list of points"),
        ("clip", ["--start", "3", "--end", "2"], r"end is 2\.0"),
        ("clip", ["--start", "-1"], "is not a number of seconds"),
        ("clip", ["--tracker", "magic"], "there is no tracker 'magic'; choose bytetrack"),
        ("clip", ["--tracker", "empty", "--device", "cpu"], "The segmenter empty cannot be loaded"),
        ("clip", ["--tracker", "empty", "--masks", "empty"], "--tracker with a model makes the masks"),
        ("clip", ["--labels", ""], "--labels"),
        ("clip", ["--state", "words.mp4"], r"words\.mp4 cannot be read"),
        ("clip", ["--state", "words.mp4/state"], r"state cannot be written .*; choose another --state"),
        ("clip", ["--rate", "5"], r"rate is 5, but a video tells its own; leave it out"),
        ("clip", ["--tighten"], "--tighten is for --masks; give both"),
        ("clip", ["--masks", "empty", "--device", "cpu"], "--masks: The segmenter empty cannot be loaded"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(source, options, sentence, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.mp4").write_text("only words")
    (tmp_path / "empty").mkdir()
    place = str(clip) if source == "clip" else source
    try:
        status = main(["track", place, "--labels", "cat", *options])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_lines_outside_the_frames_are_refused(clip, tmp_path, capsys):
    options = ["--labels", "cat", "--count-line", "0,0,999,0", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["track", str(clip), *options]) == 2
    assert "999,0 of a line or zone is outside the frames" in capsys.readouterr().err


def test_the_source_is_not_written_over(clip, tmp_path, capsys):
    (tmp_path / "annotated.mp4").write_bytes(clip.read_bytes())
    assert main(["track", str(tmp_path / "annotated.mp4"), "--labels", "cat", "--out", str(tmp_path)]) == 2
    assert "would replace" in capsys.readouterr().err


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.soak), signal.SIGTERM])
def test_a_stopped_run_leaves_whole_files(number, tmp_path, frames, fresh_python):
    """The stream goes on for ever; the run is stopped at a moment that no one chose."""
    part = write_clip(tmp_path / "part.ts", frames, gop=1).read_bytes()
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(part)
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    out = tmp_path / "out"
    options = ["--labels", "cat", "--every", "3", "--device", "cpu", "--state", tmp_path / "state", "--out", out]
    process = fresh_python.start(COMMAND, "track", address, *options)
    watched = out / "frames.jsonl"
    while process.runs() and not (watched.exists() and watched.read_bytes().count(b"\n") >= 3):
        threading.Event().wait(0.05)
    os.kill(process.number, number)
    done = process.wait()
    server.close()
    assert done.returncode == 130, done.stderr
    assert "stopped; the results so far are written" in done.stderr
    # The tracker was ahead of the last frame that was written.
    assert "state is not written, because the run was stopped" in done.stderr
    assert not (tmp_path / "state").exists()
    assert "in " in done.stdout
    found = rows(out)
    assert len(found) >= 3
    assert len(list(VideoFile(out / "annotated.mp4"))) == len(found)
    assert json.loads((out / "summary.json").read_text())["finished"] is False
    assert len(json.loads((out / "tracks.coco.json").read_text())["images"]) == len(found)
    assert os.path.getsize(out / "tracks.csv") > 0
