"""A resumed run logs the losses of all steps, also of those between the last log and the checkpoint."""

import csv
import json
import shutil

import pytest

from gdino_hf.cli import main
from gdino_hf.training.loss_record import LOSSES_FILE


def log(folder):
    """Return the lines of a run's log as numbers, without times."""
    with (folder / "log.csv").open() as file:
        lines = list(csv.DictReader(file))
    return [
        {name: float(value) for name, value in line.items() if value and not name.endswith(("second", "runtime"))}
        for line in lines
    ]


def resume_from(step, run):
    """Leave what a process killed after this checkpoint would leave, and resume."""
    for path in run.glob("checkpoint-*"):
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path)
    assert main(["train", "--resume", str(run)]) == 0


@pytest.fixture
def whole(options, tmp_path, one_thread):
    # A log every 4 steps and a checkpoint every 3: each checkpoint lies between two logs.
    common = ["--max_steps", "8", "--save_steps", "3", "--save_total_limit", "9"]
    common = [*options, *common, "--logging_steps", "4"]
    assert main([*common, "--name", "whole"]) == 0
    shutil.copytree(tmp_path / "runs" / "train" / "whole", tmp_path / "runs" / "train" / "killed")
    return tmp_path / "runs" / "train" / "whole"


def same(killed, whole):
    lines, expected = log(killed), log(whole)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        for name in other.keys() - {"minutes", "total_flos"}:
            assert line[name] == pytest.approx(other[name], rel=1e-6), name
    assert lines[-1]["train_loss"] == pytest.approx(sum(line["loss"] for line in lines[:-1]) / 2, rel=1e-3)


def test_losses_after_a_resume_are_those_of_an_uninterrupted_run(whole):
    killed = whole.parent / "killed"
    resume_from(3, killed)
    same(killed, whole)
    # Resuming a finished run takes no step and reports the same loss.
    assert main(["train", "--resume", str(killed)]) == 0
    assert log(killed)[-1]["train_loss"] == pytest.approx(log(whole)[-1]["train_loss"], rel=1e-6)


def test_a_checkpoint_without_losses_is_resumed_all_the_same(whole):
    killed = whole.parent / "killed"
    (killed / "checkpoint-6" / LOSSES_FILE).unlink()
    resume_from(6, killed)
    assert json.loads((killed / "metrics.json").read_text())["steps"] == 8
