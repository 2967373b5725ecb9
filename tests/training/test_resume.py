"""A killed training resumes and ends with the result of an uninterrupted one."""

from __future__ import annotations

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from gdino_hf.cli import main
from gdino_hf.training.saving import UNFINISHED, last_checkpoint

# On one thread the same operations run in the same order, so only the decimals in the log are rounded.
TOLERANCE = 1e-6
STEPS = 16


def losses(folder):
    with (folder / "log.csv").open() as file:
        return {int(line["step"]): float(line["loss"]) for line in csv.DictReader(file) if line["loss"]}


def start_process(arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "gdino_hf", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_at_a_random_step_it_ends_like_an_uninterrupted_run(options, tmp_path, one_thread):
    options = [*options, "--max_steps", str(STEPS), "--save_steps", "3", "--ema_decay", "0.9"]
    assert main([*options, "--name", "uninterrupted"]) == 0
    killed = tmp_path / "runs" / "train" / "killed"
    process = start_process([*options, "--name", "killed"])
    deadline = time.monotonic() + 240
    while last_checkpoint(killed) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    # A random moment: during a step after the first checkpoint, or while the next one is being written.
    time.sleep(random.Random().uniform(0, 1.0))
    process.send_signal(signal.SIGKILL)
    errors = process.communicate()[1]
    last = last_checkpoint(killed)
    assert last is not None, errors[-2000:]
    assert not (killed / "log.csv").exists(), "the process ended before it was killed"

    assert main(["train", "--resume", str(killed)]) == 0
    uninterrupted = tmp_path / "runs" / "train" / "uninterrupted"
    assert list(losses(killed)) == list(range(1, STEPS + 1))
    assert losses(killed) == pytest.approx(losses(uninterrupted), rel=TOLERANCE)
    for name, weight in load_file(uninterrupted / "model" / "model.safetensors").items():
        resumed = load_file(killed / "model" / "model.safetensors")[name]
        torch.testing.assert_close(resumed, weight, rtol=0, atol=TOLERANCE)


def test_resuming_between_epochs_or_inside_one_changes_nothing(options, tmp_path, one_thread):
    # 12 pictures in batches of 4: step 3 ends the first epoch, step 5 lies inside the second.
    runs = tmp_path / "runs" / "train"
    options = [*options, "--max_steps", "7", "--ema_decay", "0.9", "--augment", "small-set"]
    assert main([*options, "--name", "whole", "--save_steps", "100"]) == 0
    for save_steps in (3, 5):
        name = f"after-{save_steps}"
        assert main([*options, "--name", name, "--save_steps", str(save_steps)]) == 0
        # Leave what a killed process would leave: the checkpoint at this step, and no later one.
        for path in runs.joinpath(name).glob("checkpoint-*"):
            if path.name != f"checkpoint-{save_steps}":
                shutil.rmtree(path)
        assert main(["train", "--resume", str(runs / name)]) == 0
        assert losses(runs / name) == pytest.approx(losses(runs / "whole"), rel=TOLERANCE)


@pytest.mark.parametrize(
    "more",
    [
        ["--lora-rank", "2", "--lora-dropout", "0.1"],
        ["--streaming"],
        ["--replay", "{drawn}/val.json", "--gradient_accumulation_steps", "2"],
    ],
    ids=["adapters", "streaming", "replay"],
)
def test_resuming_changes_nothing_with(options, more, drawn, tmp_path, one_thread):
    runs = tmp_path / "runs" / "train"
    options = [*options, "--max_steps", "6", *(argument.replace("{drawn}", str(drawn)) for argument in more)]
    # 12 pictures in batches of 4: step 4 lies inside the second epoch.
    for name, save_steps in (("whole", 100), ("killed", 4)):
        assert main([*options, "--name", name, "--save_steps", str(save_steps)]) == 0
    shutil.rmtree(runs / "killed" / "checkpoint-6")
    assert main(["train", "--resume", str(runs / "killed")]) == 0
    assert losses(runs / "killed") == pytest.approx(losses(runs / "whole"), rel=TOLERANCE)


def test_resumes_from_another_working_directory_and_remembers_changed_options(
    options, drawn, tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(drawn)
    place = os.path.relpath(tiny_folder, drawn)
    assert main(["train", ".", *options[2:], "--model", place, "--max_steps", "1"]) == 0
    run = tmp_path / "runs" / "train" / "drawn"
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", str(run), "--max_steps", "2"]) == 0
    assert main(["train", "--resume", str(run)]) == 0
    assert list(losses(run)) == [1, 2]
    assert (run / "model" / "README.md").read_text(encoding="utf-8").count("## Fine-tuning") == 1


def test_leftovers_of_an_unfinished_checkpoint_do_not_get_into_the_next_one(options, tmp_path):
    assert main([*options, "--name", "torn", "--max_steps", "1", "--save_steps", "1"]) == 0
    run = tmp_path / "runs" / "train" / "torn"
    left = run / UNFINISHED / "checkpoint-2"
    left.mkdir(parents=True)
    (left / "average.safetensors").write_bytes(b"half")
    assert main(["train", "--resume", str(run), "--max_steps", "2"]) == 0
    assert not (run / "checkpoint-2" / "average.safetensors").exists()
    assert not (run / UNFINISHED).exists()
