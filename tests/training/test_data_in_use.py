"""`gdino train` and `gdino eval` on data as people have it: what is left out is said, and the rest is used."""

import json
import os
import resource
import shutil

import pytest
import yaml

from gdino_hf.cli import main
from gdino_hf.evaluation.ground_truth import rows_ground_truth


@pytest.fixture
def grouped(drawn):
    """The drawn data with a class that only groups the others."""
    for split in ("train", "val"):
        path = drawn / f"{split}.json"
        content = json.loads(path.read_text())
        for category in content["categories"]:
            category["supercategory"] = "animals"
        content["categories"].append({"id": 9, "name": "animals", "supercategory": "none"})
        path.write_text(json.dumps(content))
    return drawn


def test_a_grouping_class_is_left_out_of_prompts_metrics_and_card_with_a_line(options, grouped, tmp_path, capsys):
    assert main([*options, "--max_steps", "1", "--name", "left-out"]) == 0
    assert capsys.readouterr().err.count("'animals'") == 2
    run = tmp_path / "runs" / "train" / "left-out"
    card = (run / "model" / "README.md").read_text()
    assert "with 2 names (cat, dog)" in card
    assert "Left out, because they only group other names: animals." in card
    assert json.loads((run / "metrics.json").read_text())["labels"] == ["cat", "dog"]
    assert "animals" not in (run / "evaluation" / "labels.csv").read_text()
    assert main([*options, "--max_steps", "1", "--name", "kept", "--groups", "keep"]) == 0
    assert json.loads((tmp_path / "runs/train/kept/metrics.json").read_text())["labels"] == ["cat", "dog", "animals"]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"a": 1}',
        '{"images": [], "annotations": [], "categories": []}',
        '{"images": [{"id": 1, "file_name": "gone.jpg"}], "annotations": [], "categories": []}',
    ],
)
def test_a_split_found_by_itself_never_stops_training(options, drawn, content, capsys):
    (drawn / "val.json").write_text(content)
    (drawn / "test").mkdir()
    (drawn / "test" / "_annotations.coco.json").write_text(content)
    assert main([*options, "--max_steps", "1"]) == 0
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    # What is no annotation file at all is no split.
    assert "not used" in errors or content in ("{", '{"a": 1}')


def test_nothing_is_said_of_splits_that_are_not_wanted(options, drawn, capsys):
    (drawn / "val.json").write_text('{"images": [], "annotations": [], "categories": []}')
    assert main([*options, "--max_steps", "1", "--val", "none", "--test", "none"]) == 0
    assert "not used" not in capsys.readouterr().err


def test_evaluation_takes_a_root_without_valid_and_says_which_split(drawn, tiny_folder, tmp_path, capsys):
    export = tmp_path / "export"
    for folder, split in (("train", "train"), ("test", "val")):
        place = export / folder
        place.mkdir(parents=True)
        for image in json.loads((drawn / f"{split}.json").read_text())["images"]:
            shutil.copy(drawn / "images" / image["file_name"], place)
        shutil.copy(drawn / f"{split}.json", place / "_annotations.coco.json")
    common = ["--model", str(tiny_folder), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    for place, images in ((export, 4), (export / "train", 12), (export / "test", 4)):
        assert main(["eval", str(place), *common]) == 0
        captured = capsys.readouterr()
        assert f"{images} images judged" in captured.out
        assert "_annotations.coco.json" in captured.err
    shutil.rmtree(export / "test")
    assert main(["eval", str(export), *common]) == 0
    assert "12 images judged" in capsys.readouterr().out


def test_missing_and_broken_photographs_are_skipped_if_asked_for(options, drawn, tmp_path, capsys):
    (drawn / "images" / "train1.png").unlink()
    (drawn / "images" / "train2.png").write_bytes(b"")
    content = json.loads((drawn / "train.json").read_text())
    content["images"] += [None, {"id": 99}]
    content["annotations"][0]["bbox"] = [1, None, 2, 3]
    content["annotations"][1]["area"] = "large"
    content["annotations"][2]["bbox"] = [str(value) for value in content["annotations"][2]["bbox"]]
    (drawn / "train.json").write_text(json.dumps(content))
    assert main([*options, "--max_steps", "1"]) == 2
    assert "train1.png" in capsys.readouterr().err
    assert main([*options, "--max_steps", "4", "--unreadable", "skip"]) == 0
    errors = capsys.readouterr().err
    for count in (
        "missing files: 1 ",
        "unreadable files: 1 ",
        "broken entries: 2 ",
        "broken boxes: 1 ",
        "broken areas: 1 ",
    ):
        assert count in errors


def test_a_disk_that_is_full_at_the_end_leaves_no_half_model(options, tmp_path, capsys):
    run = tmp_path / "runs" / "train" / "full"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Files may not grow beyond 100 kB, which the weights exceed: to the process that looks like a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert main([*options, "--name", "full", "--max_steps", "1", "--save_strategy", "no"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert "--resume" in errors.splitlines()[-1]
    assert sorted(path.name for path in run.iterdir()) == ["arguments.yaml", "before.json"]
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / "model" / "model.safetensors").exists()


def test_resuming_a_folder_without_a_run_is_one_sentence(tmp_path, capsys):
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "has no arguments.yaml; give a run's folder" in capsys.readouterr().err


def test_limits_of_pictures_are_options_that_yaml_holds_and_a_run_keeps(options, tmp_path, capsys):
    """The drawn pictures have 4,096 pixels."""
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    described = capsys.readouterr().out
    assert "--max-megapixels" in described
    assert "default: None" not in described[described.index("\npictures") :]
    assert main([*options, "--max-megapixels", "0.004", "--max-steps", "1"]) == 2
    assert "it has 64 x 64 pixels; a picture may have 0.004 million" in capsys.readouterr().err
    config = tmp_path / "config.yaml"
    config.write_text("max_megapixels: 0.005\nbit-depth: 12\nmax_steps: 1\n")
    assert main([*options, "--config", str(config), "--name", "kept", "--unreadable", "skip"]) == 0
    run = tmp_path / "runs" / "train" / "kept"
    kept = yaml.safe_load((run / "arguments.yaml").read_text())
    assert (kept["max_megapixels"], kept["bit_depth"]) == (0.005, 12)
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--max-megapixels", "0.003"]) == 2
    assert "a picture may have 0.003 million" in capsys.readouterr().err
    assert not {"GDINO_MAX_MEGAPIXELS", "GDINO_BIT_DEPTH"} & os.environ.keys()


def federated(drawn, split):
    """Say in each picture's entry that dogs are absent, and leave their boxes out: they are not annotated."""
    path = drawn / f"{split}.json"
    content = json.loads(path.read_text())
    for number, image in enumerate(content["images"]):
        # Dogs are annotated in every other picture.
        image["neg_names"] = [] if number % 2 else ["bird"]
        if number % 2:
            content["annotations"] = [
                box for box in content["annotations"] if box["image_id"] != image["id"] or box["category_id"] == 0
            ]
    content["categories"].append({"id": 2, "name": "bird"})
    path.write_text(json.dumps(content))


def test_metrics_of_training_count_a_label_only_where_it_is_annotated(options, drawn, tmp_path, capsys, tiny_folder):
    for split in ("train", "val"):
        federated(drawn, split)
    assert main([*options, "--max_steps", "2", "--name", "some", "--eval_strategy", "steps", "--eval_steps", "1"]) == 0
    run = tmp_path / "runs" / "train" / "some"
    assert "AP of drawn/val is LVIS' fixed AP" in capsys.readouterr().out
    assert "LVIS' fixed AP" in (run / "model" / "README.md").read_text()
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    assert {"APr", "APc", "APf"} <= set(metrics["after"])
    assert json.loads((run / "evaluation" / "metrics.json").read_text())["protocol"] == "lvis"
    for model, key in ((tiny_folder, "before"), (run / "model", "after")):
        command = ["eval", str(drawn / "val.json"), "--model", str(model), "--runs", str(tmp_path / "runs")]
        assert main([*command, "--name", key, "--device", "cpu"]) == 0
        measured = json.loads((tmp_path / "runs" / "eval" / key / "metrics.json").read_text())
        assert measured["metrics"] == pytest.approx(metrics[key], abs=1e-6)
    assert json.loads((run / "evaluation" / "metrics.json").read_text())["metrics"] == pytest.approx(metrics["after"])


def test_a_metric_that_the_validation_data_does_not_have_is_refused_before_training(options, drawn, capsys):
    best = ["--max_steps", "2", "--eval_strategy", "steps", "--load_best_model_at_end", "--metric_for_best_model"]
    assert main([*options, *best, "APr"]) == 2
    assert "annotated for all labels" in capsys.readouterr().err
    for split in ("train", "val"):
        federated(drawn, split)
    assert main([*options, *best, "AR100"]) == 2
    assert "annotated for some labels per image" in capsys.readouterr().err


def test_odvg_lines_with_absent_names_are_measured_where_labels_are_annotated(tmp_path):
    rows = [
        {"boxes": [[0, 0, 8, 8]], "names": ["cat"], "neg_names": ["Dog "]},
        {"boxes": [], "names": [], "neg_names": []},
        {"boxes": [[0, 0, 8, 8]], "names": ["dog"], "neg_names": None},
    ]
    truth = rows_ground_truth(rows, ["dog", "cat", "cup"])
    assert truth.protocol == "lvis"
    assert [sorted(reference["negative_labels"]) for reference in truth.references.values()] == [[0], [], [1, 2]]
    assert rows_ground_truth([rows[2]], ["dog", "cat"]).protocol == "coco"


def test_help_says_what_an_absent_default_means(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    # Lines break where the terminal's width says.
    printed = " ".join(capsys.readouterr().out.split())
    assert "default: None" not in printed
    assert "(not set by default)" in printed
    assert "(default: nano)" in printed
