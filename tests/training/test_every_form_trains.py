"""Tests of the commands on every form of data set: a step of training, evaluation, and transformers' option names."""

import json

import pytest
import yaml

from form_cases import FORMS, NAMES, hub_saved, yolo
from gdino_hf.cli import main

SHORT = (
    *("--use_cpu", "--max-steps", "1", "--batch-size", "2", "--image-size", "64", "64"),
    *("--disable_tqdm", "true", "--val", "none", "--test", "none", "--save_strategy", "no"),
)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_training_and_evaluation_by_command(form, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    place = str(FORMS[form](tmp_path / "set"))
    assert main(["train", place, "--model", str(tiny_folder), "--name", "run", *SHORT]) == 0
    assert (tmp_path / "runs" / "train" / "run" / "model" / "model.safetensors").is_file()
    assert main(["eval", place, "--model", str(tiny_folder), "--name", "run", "--device", "cpu"]) == 0
    metrics = json.loads((tmp_path / "runs" / "eval" / "run" / "metrics.json").read_text())
    assert metrics["images"] == 3
    assert list(metrics["labels"]) == NAMES
    assert [row["boxes"] for row in metrics["labels"].values()] == [1, 1, 1]


@pytest.mark.parametrize("form", ["yolo", "hub_saved", "webdataset"])
def test_a_step_of_training_on_a_stream(form, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    place = str(FORMS[form](tmp_path / "set"))
    assert main(["train", place, "--model", str(tiny_folder), "--name", "run", "--streaming", "true", *SHORT]) == 0


def test_options_of_transformers_examples(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = hub_saved(tmp_path)
    options = ["--dataset_name", str(place), "--model_name_or_path", str(tiny_folder), "--output_dir", "out"]
    options += ["--do_train", "true", "--do_eval", "true", "--image_square_length", "64", "--max_steps", "1"]
    options += ["--per_device_train_batch_size", "2", "--remove_unused_columns", "False", "--use_cpu", "true"]
    options += ["--eval_do_concat_batches", "False", "--ignore_mismatched_sizes", "--seed", "1337"]
    assert main(["train", *options]) == 0
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    size = json.loads((tmp_path / "out" / "model" / "processor_config.json").read_text())["image_processor"]["size"]
    assert size == {"max_height": 64, "max_width": 64}
    written = yaml.safe_load((tmp_path / "out" / "arguments.yaml").read_text())
    assert written["dataset_name"] == str(place)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--dataset_name", "someone/pets"), "someone/pets does not exist, and cannot be loaded from the Hub"),
        (("--dataset_name", "cppe-5"), "hf://datasets/cppe-5 does not exist, and cannot be loaded from the Hub"),
        (("--dataset_name", "a/b", "--data", "c/d"), "give one of them"),
        (("--output_dir", ".", "--data", "{place}"), "has files; choose another"),
        (("--output_dir", "x", "--name", "y", "--data", "{place}"), "exclude each other"),
    ],
)
def test_options_that_cannot_be_used_are_one_sentence(options, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = str(yolo(tmp_path))
    assert main(["train", *(option.format(place=place) for option in options), *SHORT]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert why in line
