"""Loggers: one that is not installed is one sentence before anything is written; installed ones get every value."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from gdino_hf.cli import main
from gdino_hf.training.arguments import GDinoTrainingArguments
from gdino_hf.training.loggers import check_loggers

NAMES = ("wandb", "trackio", "tensorboard", "mlflow", "comet_ml")


def needs(name):
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")


@pytest.mark.parametrize("name", [name for name in NAMES if find_spec(name) is None])
def test_a_logger_that_is_not_installed_is_one_sentence_before_anything_is_written(name, options, tmp_path, capsys):
    assert main([*options, "--report-to", name]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert f"--report-to {name} needs {name.replace('_', '-')}; pip install" in lines[0]
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ImportError, match="pip install"):
        GDinoTrainingArguments(output_dir=str(tmp_path / "out"), report_to=[name])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in NAMES if find_spec(name) is None])
def test_a_folder_that_a_logger_left_is_not_the_logger(name, tmp_path, monkeypatch):
    """`python -m` and accelerate look for packages in the working directory, too."""
    (tmp_path / name / "offline-run-1").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=f"--report-to {name} needs"):
        check_loggers([name])


def test_an_unknown_logger_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match=r"nowhere is not supported.*wandb"):
        check_loggers("nowhere")
    for value in (None, [], "none", ["none"], "all"):
        check_loggers(value)


def train(options, logger, tmp_path, **environment):
    """Train two steps with a logger in a process of its own, without a network."""
    arguments = [*options, "--max_steps", "2", "--name", "logged", "--report-to", logger]
    return subprocess.run(
        [sys.executable, "-m", "gdino_hf", *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )


@needs("tensorboard")
def test_tensorboard_gets_the_losses(options, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(options, "tensorboard", tmp_path)
    assert run.returncode == 0, run.stderr
    (events,) = (tmp_path / "runs" / "train" / "logged").rglob("events.out.*")
    written = EventAccumulator(str(events.parent)).Reload()
    assert [event.step for event in written.Scalars("train/loss")] == [1, 2]


@needs("wandb")
def test_wandb_writes_offline(options, tmp_path):
    run = train(options, "wandb", tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@needs("trackio")
def test_trackio_writes_locally(options, tmp_path):
    run = train(options, "trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    assert run.returncode == 0, run.stderr
    assert list((tmp_path / "trackio").glob("*.db"))


@needs("wandb")
def test_wandb_without_a_key_is_one_sentence(options, tmp_path):
    run = train(options, "wandb", tmp_path, WANDB_DIR=str(tmp_path), HOME=str(tmp_path), WANDB_API_KEY="")
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "WANDB_MODE=offline" in run.stderr.splitlines()[-1]
