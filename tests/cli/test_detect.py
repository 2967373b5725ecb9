"""`gdino detect` from the command line to files: exit status, named failures, JSON, annotated pictures."""

import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from detect_command import EVERYTHING, LABELS, make_picture, run_detect
from fresh_python import COMMAND
from gdino_hf import GDinoForObjectDetection
from gdino_hf.cli import main
from gdino_hf.inference import int8_linear
from gdino_hf.inference.int8_linear import has_int8
from gdino_hf.model.box_ops import box_iou
from gdino_hf.visualize import draw_detections

# Sides are written with two digits behind the point, scores with four.
BOX_ROUNDING = 0.0051
SCORE_ROUNDING = 0.000051


@pytest.fixture(scope="module")
def everything(tmp_path_factory, tiny_folder):
    """One run that keeps every query: the photograph's path, the report and what was printed."""
    folder = tmp_path_factory.mktemp("everything")
    make_picture().save(folder / "photo.png")
    status, report, printed, _ = run_detect(tiny_folder, folder / "out", folder / "photo.png", *EVERYTHING)
    assert status == 0
    return folder / "photo.png", report, printed


def without_torch(tmp_path, *arguments, stdout=subprocess.PIPE, through=()):
    """Run `python -m gdino_hf`, maybe through another command, where importing torch or transformers fails."""
    for name in ("torch", "transformers"):
        (tmp_path / "poison").mkdir(exist_ok=True)
        (tmp_path / "poison" / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    paths = [str(tmp_path / "poison"), str(Path(sys.modules["gdino_hf"].__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"}
    command = [*through, sys.executable, "-m", "gdino_hf", *arguments]
    return subprocess.run(command, env=environment, cwd=tmp_path, stdout=stdout, stderr=subprocess.PIPE, text=True)


def test_json_holds_what_the_model_says(everything, picture, tiny_model, tiny_processor):
    _, report, _ = everything
    inputs = tiny_processor(images=picture, text=LABELS, return_tensors="pt")
    with torch.no_grad():
        outputs = tiny_model(**inputs)
    expected = tiny_processor.post_process_grounded_object_detection(
        outputs, inputs, threshold=0, text_threshold=0, target_sizes=[(80, 120)]
    )[0]
    (image,) = report["images"]
    found = image["detections"]
    assert len(found) == 20
    assert [item["label"] for item in found] == expected["text_labels"]
    assert [item["label_index"] for item in found] == expected["labels"].tolist()
    assert all(LABELS[item["label_index"]] == item["label"] for item in found)
    boxes = torch.tensor([item["box"] for item in found])
    scores = torch.tensor([item["score"] for item in found])
    torch.testing.assert_close(boxes, expected["boxes"], rtol=0, atol=BOX_ROUNDING)
    torch.testing.assert_close(scores, expected["scores"], rtol=0, atol=SCORE_ROUNDING)


def test_json_says_image_size_box_format_and_settings(detect, photo, tiny_folder):
    _, report, _, _ = detect(photo, "--threshold", "0.1", "--text-threshold", "0.2", "--nms", "0.5")
    (image,) = report.pop("images")
    assert report == {
        "model": str(tiny_folder),
        "labels": LABELS,
        "negative_labels": [],
        "threshold": 0.1,
        "text_threshold": 0.2,
        "nms": 0.5,
        "box_format": "xyxy",
        "finished": True,
        "failed": [],
    }
    assert (image["image"], image["width"], image["height"]) == (str(photo), 120, 80)


def test_json_goes_where_it_is_told(detect, photo, tmp_path):
    status, report, printed, _ = detect(photo, json_path=tmp_path / "deep" / "found.json")
    assert status == 0
    assert len(report["images"]) == 1
    assert "found.json" in printed
    assert not (tmp_path / "out" / "detections.json").exists()


def test_annotated_picture_shows_the_boxes_of_the_json(everything, picture):
    _, report, _ = everything
    (image,) = report["images"]
    annotated = Image.open(image["annotated"])
    assert Path(image["annotated"]).name == "photo.png"
    assert annotated.size == (120, 80)
    assert np.asarray(annotated).tolist() != np.asarray(picture).tolist()
    result = {
        "boxes": [item["box"] for item in image["detections"]],
        "scores": [item["score"] for item in image["detections"]],
        "text_labels": [item["label"] for item in image["detections"]],
    }
    redrawn = np.asarray(draw_detections(picture, result)).astype(int)
    # Rounding may move a side by a pixel where it lay between two.
    assert (np.abs(redrawn - np.asarray(annotated)).max(-1) > 0).mean() < 0.02


def test_table_names_image_label_score_and_box(everything):
    photo, report, printed = everything
    best = report["images"][0]["detections"][0]
    row = next(line for line in printed.splitlines() if line.startswith(str(photo)))
    assert row.split()[-5:] == [f"{best['score']:.2f}", *(str(round(side)) for side in best["box"])]
    assert best["label"] in row
    assert "20 detections in 1 image\n" in printed


def test_no_detection_is_success(detect, photo):
    status, report, printed, _ = detect(photo, "--threshold", "1")
    assert status == 0
    assert report["images"][0]["detections"] == []
    assert "0 detections in 1 image" in printed


def test_threshold_and_text_threshold_bound_the_scores(detect, photo):
    _, everything, _, _ = detect(photo, *EVERYTHING, labels="cat")
    scores = sorted(item["score"] for item in everything["images"][0]["detections"])
    middle = (scores[9] + scores[10]) / 2
    for options in (("--threshold", middle, "--text-threshold", 0), ("--threshold", 0, "--text-threshold", middle)):
        _, report, _, _ = detect(photo, *options, labels="cat")
        # one token per label: its best token is its score
        assert sorted(item["score"] for item in report["images"][0]["detections"]) == scores[10:]


@pytest.mark.parametrize(("threshold", "expected"), [("0.6", 0.25), ("0.25", 0.25), ("0.05", 0.05)])
def test_a_lower_threshold_is_not_undone_by_the_text_threshold(detect, threshold, expected):
    # the settings are written whether or not an image could be read
    _, report, _, _ = detect("no/such.jpg", "--threshold", threshold)
    assert report["text_threshold"] == expected


def test_nms_leaves_no_two_boxes_of_a_label_that_overlap_more(detect, photo):
    _, every, _, _ = detect(photo, *EVERYTHING, labels="cat")

    def largest_overlap(report):
        boxes = torch.tensor([item["box"] for item in report["images"][0]["detections"]])
        return box_iou(boxes, boxes).triu(1).max().item()

    threshold = largest_overlap(every) / 2
    assert threshold > 0.01
    _, fewer, _, _ = detect(photo, *EVERYTHING, "--nms", threshold, labels="cat")
    # Sides are rounded to a hundredth of a pixel and several pixels long.
    assert largest_overlap(fewer) <= threshold + 0.005
    assert fewer["images"][0]["detections"][0] == every["images"][0]["detections"][0]


def test_negative_labels_compete_and_are_left_out(detect, photo, everything):
    winners = [item["label"] for item in everything[1]["images"][0]["detections"]]
    negative = max(LABELS, key=winners.count)
    positives = [label for label in LABELS if label != negative]
    _, every, _, _ = detect(photo, *EVERYTHING, labels=", ".join([*positives, negative]))
    _, report, _, _ = detect(photo, *EVERYTHING, "--negative", negative, labels=", ".join(positives))
    kept = [item for item in every["images"][0]["detections"] if item["label"] != negative]
    assert len(kept) < len(every["images"][0]["detections"])
    assert report["images"][0]["detections"] == kept
    assert (report["labels"], report["negative_labels"]) == (positives, [negative])


def test_a_label_is_not_positive_and_negative_at_once(detect, photo):
    status, report, _, complaint = detect(photo, "--negative", "dog, cat", labels="cat")
    assert (status, report) == (2, None)
    assert "'cat' is in --labels and in --negative" in complaint


def save_broken(folder, picture):
    """Five files that hold no whole picture, of three kinds, and the name of each."""
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no picture")
    picture.save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    picture.save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "whole.png").unlink()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "header.webp").write_bytes(b"RIFF\x00\x00\x00\x00WEBP")
    return {"empty.jpg", "text.jpg", "truncated.jpg", "truncated.png", "header.webp"}


def test_broken_images_are_named_and_the_rest_go_on(detect, photo, picture):
    broken = save_broken(photo.parent, picture)
    for name in ("a-first.png", "z-last.png"):
        shutil.copy(photo, photo.parent / name)
    status, report, printed, complaints = detect(photo.parent, *EVERYTHING)
    assert status == 1
    assert {Path(item["image"]).name for item in report["failed"]} == broken
    assert [Path(item["image"]).name for item in report["images"]] == ["a-first.png", "photo.png", "z-last.png"]
    assert {len(item["detections"]) for item in report["images"]} == {20}
    for item in report["failed"]:
        lines = [line for line in complaints.splitlines() if line.startswith(f"gdino detect: {item['image']}: ")]
        assert lines == [f"gdino detect: {item['image']}: {item['error']}"]
    assert "Traceback" not in complaints
    assert "60 detections in 3 images; 5 inputs failed, see above" in printed


def test_a_folder_of_every_format_is_done_and_the_rest_is_counted(detect, photo, picture):
    for name in ("a.jp2", "b.ppm", "c.jpe", "d"):
        picture.save(photo.parent / name, {"a.jp2": "JPEG2000", "b.ppm": "PPM"}.get(name, "JPEG"))
    (photo.parent / "e.svg").write_text("<svg/>")
    (photo.parent / "notes.txt").write_text("no picture")
    status, report, _, complaints = detect(photo.parent)
    assert status == 1
    assert [Path(item["image"]).name for item in report["images"]] == ["a.jp2", "b.ppm", "c.jpe", "d", "photo.png"]
    assert [Path(item["image"]).name for item in report["failed"]] == ["e.svg"]
    assert f"gdino detect: {photo.parent}: 1 file left out: 1 is not a picture" in complaints.splitlines()


def test_limits_and_bit_depth_are_options(detect, photo):
    status, report, _, _ = detect(photo, "--max-megapixels", "0.001")
    assert status == 1
    assert "it has 120 x 80 pixels; a picture may have 0.001 million" in report["failed"][0]["error"]
    assert detect(photo, "--max-megabytes", "0.0001")[0] == 1
    assert detect(photo)[0] == 0
    Image.fromarray(np.full((60, 90), 100, dtype=np.uint16)).save(photo)
    _, report, _, _ = detect(photo, "--bit-depth", "6")
    assert "pixels up to 100, but 6 bits hold at most 63" in report["failed"][0]["error"]
    assert detect(photo, "--bit-depth", "12")[0] == 0
    assert "GDINO_BIT_DEPTH" not in os.environ


@pytest.mark.parametrize(
    ("option", "value"), [("--max-megapixels", "0"), ("--max-seconds", "x"), ("--bit-depth", "-3")]
)
def test_limits_that_are_no_numbers_are_usage_errors(detect, photo, option, value):
    with pytest.raises(SystemExit) as stop:
        detect(photo, option, value)
    assert stop.value.code == 2


def test_pictures_of_odd_sizes_are_done(detect, tmp_path):
    sizes = [(1, 1), (10_000, 8), (2, 2), (8, 3000)]
    paths = [tmp_path / f"{width}x{height}.png" for width, height in sizes]
    for path, size in zip(paths, sizes, strict=True):
        Image.new("RGB", size, (200, 30, 30)).save(path)
    status, report, _, complaints = detect(*paths, *EVERYTHING)
    assert (status, report["failed"]) == (0, []), complaints
    assert [(image["width"], image["height"]) for image in report["images"]] == sizes
    assert [len(image["detections"]) for image in report["images"]] == [20] * len(sizes)
    assert [Image.open(image["annotated"]).size for image in report["images"]] == sizes


def test_a_16_bit_picture_gives_what_its_8_bit_twin_gives(detect, photo):
    grey = np.random.default_rng(1).integers(0, 256, (60, 90), dtype=np.uint16)
    Image.fromarray(grey * 257).save(photo)
    assert Image.open(photo).mode.startswith("I;16")
    _, deep, _, _ = detect(photo, *EVERYTHING)
    Image.fromarray(grey.astype(np.uint8)).save(photo)
    _, shallow, _, _ = detect(photo, *EVERYTHING)
    assert deep == shallow
    assert Image.open(deep["images"][0]["annotated"]).mode == "RGB"


def test_pictures_of_every_mode_are_done(detect, picture, tmp_path):
    paths = [
        tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}" for mode in ("L", "LA", "P", "RGBA", "CMYK", "1")
    ]
    for path in paths:
        picture.convert(path.stem).save(path)
    status, report, _, complaints = detect(*paths, *EVERYTHING)
    assert status == 0, complaints
    assert [len(image["detections"]) for image in report["images"]] == [20] * len(paths)


def test_a_picture_turned_by_exif_gives_boxes_in_upright_pixels(detect, photo, picture):
    upright = photo.with_name("upright.png")
    picture.save(upright)
    # 6: the camera was turned, a viewer must rotate by 90 degrees clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = picture.transpose(Image.Transpose.ROTATE_90)
    lying.save(photo, exif=exif)
    assert Image.open(photo).size == (80, 120)
    _, report, _, _ = detect(photo, upright, *EVERYTHING)
    turned, straight = report["images"]
    assert (turned["width"], turned["height"]) == (120, 80)
    assert turned["detections"] == straight["detections"]
    assert Image.open(turned["annotated"]).size == (120, 80)
    assert np.array_equal(Image.open(turned["annotated"]), Image.open(straight["annotated"]))


def test_a_file_that_does_not_exist_is_an_input_that_failed(detect, photo):
    status, report, _, complaints = detect("no/such.jpg", photo)
    assert status == 1
    assert report["failed"] == [{"image": "no/such.jpg", "error": "there is no such file or folder"}]
    assert len(report["images"]) == 1
    assert "gdino detect: no/such.jpg: there is no such file or folder" in complaints


def test_globs_and_folders_keep_their_shape_in_the_output(detect, photo, tmp_path):
    deep = photo.parent / "deep" / "photo.png"
    deep.parent.mkdir()
    shutil.copy(photo, deep)
    _, report, _, _ = detect(photo.parent)
    names = [Path(image["annotated"]).relative_to(tmp_path / "out").as_posix() for image in report["images"]]
    assert names == ["deep/photo.png", "photo.png"]
    _, report, _, _ = detect(photo.parent / "**" / "*.png")
    assert len(report["images"]) == 2
    # from a glob both files have the same name: neither may replace the other
    assert len({image["annotated"] for image in report["images"]}) == 2


def test_inputs_are_never_written_over(photo, tiny_folder):
    shouting = photo.with_name("PHOTO2.PNG")
    shutil.copy(photo, shouting)
    before = photo.read_bytes()
    status, report, _, _ = run_detect(tiny_folder, photo.parent, photo, shouting, *EVERYTHING)
    assert status == 0
    assert [Path(image["annotated"]).name for image in report["images"]] == ["photo-2.png", "PHOTO2-2.PNG"]
    assert photo.read_bytes() == shouting.read_bytes() == before


def test_the_json_is_not_written_over_an_image(photo, tiny_folder, tmp_path, capsys):
    before = photo.read_bytes()
    options = ["--labels", "cat", "--model", str(tiny_folder), "--out", str(tmp_path), "--json", str(photo)]
    assert main(["detect", str(photo), *options]) == 2
    assert "is one of the images" in capsys.readouterr().err
    assert photo.read_bytes() == before


def test_a_second_run_replaces_the_first(detect, photo, tmp_path):
    detect(photo)
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    detect(photo)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before == ["detections.json", "photo.png"]


def test_pictures_from_a_web_address(detect, photo, picture, monkeypatch):
    (photo.parent / "empty.jpg").write_bytes(b"")
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(photo.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            status, report, _, _ = detect(
                f"{address.upper()}/photo.png?size=full", f"{address}/absent.png", f"{address}/empty.jpg", *EVERYTHING
            )
        finally:
            server.shutdown()
    _, local, _, _ = detect(photo, *EVERYTHING)
    assert status == 1
    (image,) = report["images"]
    assert image["detections"] == local["images"][0]["detections"]
    assert Path(image["annotated"]).name == "photo.png"
    assert [item["image"] for item in report["failed"]] == [f"{address}/absent.png", f"{address}/empty.jpg"]
    assert "404" in report["failed"][0]["error"]
    assert "0 bytes" in report["failed"][1]["error"]


def test_a_server_that_is_not_there_is_an_input_that_failed(detect, photo, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    # port 9 of this machine: nobody listens
    status, report, _, _ = detect("http://127.0.0.1:9/x.jpg", photo)
    assert status == 1
    assert report["failed"][0]["image"] == "http://127.0.0.1:9/x.jpg"
    assert report["failed"][0]["error"] == (
        "it cannot be read (127.0.0.1 cannot be asked: Connection refused); check the address and the network"
    )
    assert len(report["images"]) == 1


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ("", "--labels '' holds no label"),
        (" , ", "holds no label"),
        ("x" * 10_000, "has 10000 characters but a prompt of 64 tokens takes at most"),
        ("cat, " + "a b " * 200, "tokens but a prompt of 64 takes at most"),
        ("cat, ?", "The label '?' has nothing to look for in it"),
        ("@no/such/file.txt", "the label file cannot be read"),
    ],
)
def test_labels_that_cannot_be_used_are_one_sentence_and_a_usage_error(detect, photo, tmp_path, labels, reason):
    status, report, printed, complaint = detect(photo, labels=labels)
    assert (status, report, printed) == (2, None, "")
    assert complaint.startswith("gdino detect: error: ")
    assert reason in complaint
    assert len(complaint.splitlines()) == 1
    assert len(complaint) < 300
    assert not (tmp_path / "out").exists()


def test_labels_of_a_file_that_end_in_periods_are_the_callers_labels(detect, photo, tmp_path):
    (tmp_path / "labels.txt").write_text("St. cat.\ndog.\n")
    _, report, _, _ = detect(photo, *EVERYTHING, labels=f"@{tmp_path / 'labels.txt'}")
    assert report["labels"] == ["St. cat.", "dog."]
    assert {item["label"] for item in report["images"][0]["detections"]} <= {"St. cat.", "dog?"}


@pytest.mark.parametrize(
    "options",
    [
        ["--threshold", "1.5"],
        ["--threshold", "nan"],
        ["--nms", "much"],
        ["--dtype", "int4"],
        ["--unknown"],
    ],
)
def test_options_that_cannot_be_used_exit_with_2(photo, options, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["detect", str(photo), "--labels", "cat", *options])
    assert stopped.value.code == 2
    assert options[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("arguments"), [[], ["detect"], ["detect", "x.jpg"], ["detect", "--labels", "cat"], ["fly"]])
def test_a_command_line_that_is_incomplete_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: gdino" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", "no/such/folder/here"], "--model no/such/folder/here cannot be loaded (there is no such folder)"),
        (["--model", "./absent"], "--model ./absent cannot be loaded (there is no such folder)"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["--device", "toaster"], "--device toaster cannot be used here"),
    ],
)
def test_models_and_devices_that_cannot_be_used_exit_with_2(photo, capsys, tiny_folder, tmp_path, options, reason):
    status = main(
        ["detect", str(photo), "--labels", "cat", "--model", str(tiny_folder), "--out", str(tmp_path), *options]
    )
    complaint = capsys.readouterr().err
    assert status == 2
    assert reason in complaint.splitlines()[-1]
    assert "Traceback" not in complaint


# A port that nobody listens on.
UNREACHABLE = "http://127.0.0.1:9"


def test_an_unknown_name_where_the_hub_does_not_answer_is_one_sentence(photo, tmp_path, capsys, monkeypatch, caplog):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", UNREACHABLE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert main(["detect", str(photo), "--labels", "cat", "--model", "runs/nope", "--out", str(tmp_path)]) == 2
    complaint = capsys.readouterr().err
    assert "--model runs/nope cannot be loaded (there is no such folder, it was not downloaded before" in complaint
    assert len(complaint.splitlines()) == 1
    assert not caplog.records, "a loader was let loose on a Hub that does not answer"


def test_a_model_that_was_downloaded_runs_where_the_hub_does_not_answer(photo, tmp_path, tiny_folder, fresh_python):
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_folder, repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": UNREACHABLE}
    options = ["--labels", "cat", "--model", "someone/tiny", "--out", tmp_path / "out"]
    run = fresh_python.run(COMMAND, "detect", photo, *options, environment=environment)
    assert run.returncode == 0, run.stderr
    assert "Retry" not in run.stderr
    assert (tmp_path / "out" / "detections.json").is_file()


def test_the_folder_of_a_run_says_where_its_model_is(damaged, photo, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.move(damaged, run / "model")
    status, _, _, complaint = run_detect(run, tmp_path / "out", photo)
    assert status == 2
    assert f"(the model of this run is in {run / 'model'})" in complaint


def test_a_model_of_another_architecture_is_refused(photo, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    assert main(["detect", str(photo), "--labels", "cat", "--model", str(other), "--out", str(tmp_path)]) == 2
    assert "its model_type is 'bert'" in capsys.readouterr().err


@pytest.fixture
def damaged(tmp_path, tiny_folder):
    """A copy of the tiny model's folder, to take something out of."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "damaged"))


def test_a_checkpoint_without_all_weights_is_refused(damaged, photo, tmp_path):
    weights = safetensors.torch.load_file(damaged / "model.safetensors")
    missing = [name for name in weights if ".decoder." in name]
    kept = {name: tensor for name, tensor in weights.items() if name not in missing}
    safetensors.torch.save_file(kept, damaged / "model.safetensors", metadata={"format": "pt"})
    status, report, _, complaint = run_detect(damaged, tmp_path / "out", photo)
    assert (status, report) == (2, None)
    sentence = complaint.splitlines()[-1]
    assert f"--model {damaged} cannot be loaded (its files lack {len(missing)} weights" in sentence
    assert min(missing) in sentence


def test_a_model_without_its_tokenizer_is_refused(damaged, photo, tmp_path):
    for file in [*damaged.glob("*token*"), *damaged.glob("vocab*")]:
        file.unlink()
    status, report, _, complaint = run_detect(damaged, tmp_path / "out", photo)
    assert (status, report) == (2, None)
    assert f"--model {damaged} cannot be loaded (its tokenizer knows no words" in complaint.splitlines()[-1]


def test_boxes_end_at_the_borders_of_the_picture(damaged, photo, tmp_path):
    weights = safetensors.torch.load_file(damaged / "model.safetensors")
    for name, tensor in weights.items():
        if name.startswith("bbox_embed.") and name.endswith(".layers.2.bias"):
            # boxes that are nearly as large as the picture, wherever their centres are
            tensor[2:] += 8
    safetensors.torch.save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    _, report, printed, _ = run_detect(damaged, tmp_path / "out", photo, *EVERYTHING)
    boxes = np.array([item["box"] for item in report["images"][0]["detections"]])
    assert ((boxes >= 0) & (boxes <= [120, 80, 120, 80])).all()
    assert (boxes[:, 0] == 0).any()
    assert (boxes[:, 2] == 120).any()
    row = next(line for line in printed.splitlines() if line.startswith(str(photo)))
    assert row.split()[-4:] == [str(round(side)) for side in boxes[0]]


def test_labels_beyond_what_the_model_reads_at_once_are_looked_for_too(detect, photo, tiny_model):
    # the processor alone would put 80 tokens into one prompt, the model reads 64
    words = sorted({f"{first}{second}" for first in "abcd" for second in "efghij"})
    assert tiny_model.config.max_text_len < 3 * len(words)
    status, report, _, complaints = detect(photo, *EVERYTHING, labels=", ".join(words))
    assert status == 0, complaints
    assert report["images"][0]["detections"]


def test_results_that_cannot_be_written_are_said_before_the_work(detect, photo, tmp_path, tiny_folder):
    (tmp_path / "file").write_text("")
    status, _, _, complaint = run_detect(tiny_folder, tmp_path / "file" / "below", photo)
    assert status == 2
    assert "choose another --out or --json" in complaint
    (tmp_path / "folder.json").mkdir()
    status, _, _, complaint = detect(photo, json_path=tmp_path / "folder.json")
    assert status == 2
    assert "is a folder" in complaint


@contextlib.contextmanager
def at_pipes(action, *pipes):
    """Do something each time the command has opened one of the pipes and blocks in its read.

    The pipes are empty pictures: inputs that fail. They are opened ahead, while earlier inputs may be in work.
    """

    def wait():
        for pipe in pipes:
            with pipe.open("wb"):
                action(pipe)

    for pipe in pipes:
        os.mkfifo(pipe)
    watcher = threading.Thread(target=wait, daemon=True)
    watcher.start()
    yield
    watcher.join(timeout=60)
    assert not watcher.is_alive(), "the command did not open every pipe"


def wait_for(condition):
    """Wait until something has happened; fail if it takes suspiciously long."""
    end = time.monotonic() + 50
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.fixture
def earlier_report(tmp_path):
    path = tmp_path / "out" / "detections.json"
    path.parent.mkdir()
    path.write_text("an earlier report")
    return path


def test_results_are_on_disk_before_the_last_image_is_done(detect, photo, earlier_report, tmp_path, monkeypatch):
    monkeypatch.setattr("gdino_hf.cli.report_file.WRITE_EVERY_SECONDS", 0)
    monkeypatch.setattr("gdino_hf.cli.report_file._LARGEST_SHARE_OF_TIME", float("inf"))
    first, last = tmp_path / "first.png", tmp_path / "last.png"
    seen = []

    def look(pipe):
        # The photograph's result arrives while the last input blocks.
        wait_for(lambda: pipe == first or json.loads(earlier_report.read_text())["images"])
        seen.append(json.loads(earlier_report.read_text()))

    with at_pipes(look, first, last):
        status, finished, _, _ = detect(first, photo, last, *EVERYTHING)
    before, between = seen
    assert (before["images"], before["finished"]) == ([], False)
    assert between["images"] == finished["images"]
    assert (status, between["finished"], finished["finished"]) == (1, False, True)
    assert [Path(item["image"]).name for item in between["failed"]] == ["first.png"]


def test_an_earlier_report_stays_until_there_are_new_results(detect, photo, earlier_report, tmp_path):
    seen = []
    with at_pipes(lambda _: seen.append(earlier_report.read_text()), tmp_path / "pipe.png"):
        detect(tmp_path / "pipe.png", photo)
    assert seen == ["an earlier report"]


def test_results_that_can_no_longer_be_written_are_one_sentence(detect, photo, tmp_path):
    path = tmp_path / "out" / "detections.json"

    def replace(_):
        wait_for(path.is_file)
        path.unlink()
        path.mkdir()

    with at_pipes(replace, tmp_path / "pipe.png"):
        status, _, _, complaint = detect(photo, tmp_path / "pipe.png")
    assert status == 1
    assert "the results cannot be written" in complaint.splitlines()[-1]
    assert "Traceback" not in complaint


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", pytest.param("int8", marks=pytest.mark.skipif(not has_int8(), reason="no VNNI"))]
)
def test_low_precision_gives_finite_results_for_every_query(detect, photo, dtype):
    status, report, _, complaints = detect(photo, *EVERYTHING, "--dtype", dtype, "--device", "cpu")
    assert status == 0, complaints
    found = report["images"][0]["detections"]
    assert len(found) == 20
    assert np.isfinite([[item["score"], *item["box"]] for item in found]).all()


def test_int8_where_there_is_none_is_one_sentence(detect, photo, monkeypatch):
    def load(*_, **__):
        raise AssertionError("what cannot run was loaded, maybe downloaded")

    monkeypatch.setattr(GDinoForObjectDetection, "from_pretrained", load)
    monkeypatch.setattr(int8_linear, "find_compiled", lambda name: None)
    status, _, _, complaint = detect(photo, "--dtype", "int8", "--device", "cpu")
    assert status == 2
    assert "--dtype int8 cannot be used (int8 needs compiled layers" in complaint
    assert "Traceback" not in complaint


def test_help_and_mistakes_need_no_torch(tmp_path):
    helped = without_torch(tmp_path, "detect", "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "--text-threshold" in helped.stdout
    version = without_torch(tmp_path, "--version")
    assert version.stdout.startswith("gdino 0.")
    assert without_torch(tmp_path, "detect", "x.jpg", "--labels", "").returncode == 2
    absent = without_torch(tmp_path, "detect", "x.jpg", "--labels", "cat")
    assert absent.returncode == 1
    assert absent.stderr == "gdino detect: x.jpg: there is no such file or folder\n"


def test_a_reader_that_stops_early_is_no_traceback(tmp_path):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        stopped = without_torch(tmp_path, "detect", "x.jpg", "--labels", "cat", stdout=closed)
    assert "Traceback" not in stopped.stderr
    assert "Exception" not in stopped.stderr
    assert json.loads((tmp_path / "detections" / "detections.json").read_text())["failed"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_output_on_a_full_disk_is_one_sentence(tmp_path):
    with open("/dev/full", "w") as full:
        stopped = without_torch(tmp_path, "detect", "x.jpg", "--labels", "cat", stdout=full)
    assert stopped.returncode == 1
    failed, complaint = stopped.stderr.splitlines()
    assert failed.startswith("gdino detect: x.jpg: ")
    assert complaint.startswith("gdino detect: error: the output cannot be written (")
    assert json.loads((tmp_path / "detections" / "detections.json").read_text())["failed"]


@pytest.mark.skipif(shutil.which("sh") is None, reason="there is no shell to close a stream with")
@pytest.mark.parametrize("stream", ["1", "2"])
def test_a_closed_stream_is_one_that_nobody_reads(tmp_path, stream):
    through = ["sh", "-c", f'exec "$@" {stream}>&-', "sh"]
    done = without_torch(tmp_path, "detect", "x.jpg", "--labels", "cat", through=through)
    heard = {"1": done.stderr, "2": done.stdout}[stream]
    silent = {"1": done.stdout, "2": done.stderr}[stream]
    expected = {"1": "gdino detect: x.jpg: there is no such file or folder", "2": "0 detections in 0 images"}[stream]
    assert (done.returncode, silent) == (1, "")
    assert expected in heard
    assert "Traceback" not in heard
    assert json.loads((tmp_path / "detections" / "detections.json").read_text())["failed"]


def test_help_says_what_a_period_does(capsys):
    with pytest.raises(SystemExit):
        main(["detect", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert 'commas, periods and line breaks separate labels ("St. Bernard"' in printed


def test_python_m_gdino_hf_is_the_command(photo, tiny_folder, tmp_path):
    command = [sys.executable, "-m", "gdino_hf", "detect", str(photo), "--labels", "cat", "--model", str(tiny_folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(sys.modules["gdino_hf"].__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "results: detections" in done.stdout
    assert (tmp_path / "detections" / "photo.png").is_file()
    assert json.loads((tmp_path / "detections" / "detections.json").read_text())["images"][0]["width"] == 120
