"""A killed training resumes and ends with the result of an uninterrupted one."""

from __future__ import annotations

import csv
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from gdino_hf.cli import main
from gdino_hf.training.saving import UNFINISHED, last_checkpoint

# On one thread the same operations run in the same order, so only the decimals in the log are rounded.
TOLERANCE = 1e-6
STEPS = 7


def losses(folder):
    with (folder / "log.csv").open() as file:
        return {int(line["step"]): float(line["loss"]) for line in csv.DictReader(file) if line["loss"]}


# Runs the command and kills the process inside the writing of its second checkpoint.
KILLED = """
import os, signal, sys
from gdino_hf.cli import main
from gdino_hf.training.loss_record import LossRecord

save, calls = LossRecord.save, []


def save_or_die(*arguments):
    calls.append(arguments)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*arguments)


LossRecord.save = staticmethod(save_or_die)
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_while_it_writes_a_checkpoint_it_ends_like_an_uninterrupted_run(
    options, tmp_path, one_thread, fresh_python
):
    """Moments that are drawn at random are left to test_kills.py."""
    options = [*options, "--max_steps", str(STEPS), "--save_steps", "3", "--ema_decay", "0.9"]
    assert main([*options, "--name", "uninterrupted"]) == 0
    killed = tmp_path / "runs" / "train" / "killed"
    done = fresh_python.run(KILLED, *options, "--name", "killed")
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert last_checkpoint(killed).name == "checkpoint-3"
    assert (killed / UNFINISHED / "checkpoint-6").is_dir()

    assert main(["train", "--resume", str(killed)]) == 0
    uninterrupted = tmp_path / "runs" / "train" / "uninterrupted"
    assert not (killed / UNFINISHED).exists()
    assert list(losses(killed)) == list(range(1, STEPS + 1))
    assert losses(killed) == pytest.approx(losses(uninterrupted), rel=TOLERANCE)
    resumed = load_file(killed / "model" / "model.safetensors")
    for name, weight in load_file(uninterrupted / "model" / "model.safetensors").items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=TOLERANCE)


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
