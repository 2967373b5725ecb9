"""Processes killed at any moment, again and again: what they leave is whole, and nothing is lost or doubled.

`pytest -m soak tests/training/test_kills.py` kills a training 12 times and an evaluation 5 times, at moments drawn at
random; without it, an evaluation is killed once, in the middle of a line that it writes.
"""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from safetensors.torch import load_file

from gdino_hf.cli import main

# On one thread the same operations run in the same order, so only the decimals in the log are rounded.
TOLERANCE = 1e-6
STEPS = 16


def kill_after(arguments, seconds):
    """Run a command in a process of its own, and kill it after a time if it has not ended."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "gdino_hf", *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
    assert "Traceback" not in errors, errors[-3000:]


def assert_whole(folder):
    """Check that every finished file of a run can be read."""
    for path in folder.rglob("*"):
        if "unfinished" in str(path.relative_to(folder)) or not path.is_file():
            continue
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".csv":
            assert path.read_bytes().endswith(b"\n")
    for model in (folder / "model", *folder.glob("checkpoint-*")):
        assert not model.exists() or {"config.json", "model.safetensors"} <= {path.name for path in model.iterdir()}


def timed(arguments):
    """Run a command in a process of its own to its end, and return the seconds it took."""
    begin = time.monotonic()
    kill_after(arguments, None)
    return time.monotonic() - begin


def train_with_kills(options, tmp_path, kills, seed):
    runs = tmp_path / "runs" / "train"
    options = [*options, "--max_steps", STEPS, "--save_steps", "3", "--logging_steps", "1", "--ema_decay", "0.9"]
    seconds = timed([*options, "--name", "whole"])
    whole, killed = runs / "whole", runs / "killed"
    rng = random.Random(seed)
    for _ in range(kills):
        if not (killed / "arguments.yaml").exists():
            # Killed before it wrote anything: there is nothing to resume.
            shutil.rmtree(killed, ignore_errors=True)
            arguments = [*options, "--name", "killed"]
        else:
            arguments = ["train", "--resume", killed]
        kill_after(arguments, rng.uniform(0.3, 1.1) * seconds)
        assert_whole(killed)
    resumable = (killed / "arguments.yaml").exists()
    kill_after(["train", "--resume", killed] if resumable else [*options, "--name", "killed"], None)
    assert_whole(killed)
    logs = []
    for folder in (whole, killed):
        with (folder / "log.csv").open() as file:
            logs.append({int(line["step"]): float(line["loss"]) for line in csv.DictReader(file) if line["loss"]})
        lines = (folder / "log.csv").read_text().splitlines()
        # A header, each step once, and the line of the whole run.
        assert len(lines) == STEPS + 2
    assert list(logs[1]) == list(range(1, STEPS + 1))
    assert logs[1] == pytest.approx(logs[0], rel=TOLERANCE)
    results = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, killed)]
    assert results[1]["metrics"] == results[0]["metrics"]
    assert results[1]["steps"] == STEPS
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (whole, killed)]
    for name, weight in weights[0].items():
        assert (weights[1][name] - weight).abs().max() <= TOLERANCE
    assert not list(killed.rglob("*unfinished*"))


def copy_pictures(folder, count):
    """Repeat the pictures and boxes of a validation split under new names until there are as many as asked for."""
    content = json.loads((folder / "val.json").read_text())
    images, boxes = [], []
    for number in range(count):
        image = content["images"][number % len(content["images"])]
        shutil.copy(folder / "images" / image["file_name"], folder / "images" / f"copy{number}.png")
        images.append({**image, "id": number, "file_name": f"copy{number}.png"})
        boxes += [{**box, "image_id": number} for box in content["annotations"] if box["image_id"] == image["id"]]
    path = folder / "many.json"
    path.write_text(json.dumps({**content, "images": images, "annotations": boxes}))
    return path


def start_or_resume(folder):
    """Return the options to continue an evaluation in a folder, or to start one if none has begun there."""
    if (folder / "predictions.jsonl").exists():
        return ["--resume", folder]
    shutil.rmtree(folder, ignore_errors=True)
    return ["--name", folder.name]


def evaluate_with_kills(drawn, tmp_path, tiny_folder, kills, seed):
    options = evaluation(drawn, tmp_path, tiny_folder, 60)
    seconds = timed([*options, "--name", "whole"])
    whole, killed = (tmp_path / "runs" / "eval" / name for name in ("whole", "killed"))
    rng = random.Random(seed)
    for _ in range(kills):
        kill_after([*options, *start_or_resume(killed)], rng.uniform(0.3, 1) * seconds)
        assert_whole(killed)
    kill_after([*options, *start_or_resume(killed)], None)
    assert_equal_evaluations(killed, whole, 60)


def evaluation(drawn, tmp_path, tiny_folder, count):
    """Return the command for the evaluation of so many pictures."""
    data = copy_pictures(drawn, count)
    return ["eval", data, "--model", tiny_folder, "--runs", tmp_path / "runs", "--batch", "1", "--device", "cpu"]


def assert_equal_evaluations(killed, whole, count):
    images = []
    for folder in (whole, killed):
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        images.append({line["image_id"]: line for line in lines[1:]})
        # A header, and each picture once.
        assert len(lines) == count + 1
    assert images[0] == images[1]
    results = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, killed)]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}


# Runs the command and kills the process in the middle of the fifth line that it writes to the predictions.
KILLED = """
import json, os, signal, sys
from gdino_hf.cli import main
from gdino_hf.evaluation.prediction_file import PredictionFile

write, calls = PredictionFile._write, []


def write_or_die(self, line):
    calls.append(line)
    if len(calls) == 5:
        self._file.write(json.dumps(line)[:20])
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, line)


PredictionFile._write = write_or_die
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_an_evaluation_that_was_killed_loses_and_doubles_nothing(
    drawn, tmp_path, tiny_folder, one_thread, fresh_python
):
    options = [str(option) for option in evaluation(drawn, tmp_path, tiny_folder, 8)]
    whole, killed = (tmp_path / "runs" / "eval" / name for name in ("whole", "killed"))
    done = fresh_python.run(KILLED, *options, "--name", "killed")
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert_whole(killed)
    *lines, last = (killed / "predictions.jsonl").read_text().split("\n")
    assert len(lines) == 4
    assert len(last) == 20
    assert main([*options, "--resume", str(killed)]) == 0
    assert main([*options, "--name", "whole"]) == 0
    assert_equal_evaluations(killed, whole, 8)


@pytest.mark.soak
def test_an_evaluation_that_was_killed_five_times_loses_and_doubles_nothing(drawn, tmp_path, tiny_folder):
    evaluate_with_kills(drawn, tmp_path, tiny_folder, kills=5, seed=1)


@pytest.mark.soak
def test_a_training_that_was_killed_twelve_times_loses_and_doubles_nothing(options, tmp_path):
    train_with_kills(options, tmp_path, kills=12, seed=2)
