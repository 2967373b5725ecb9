"""Every failure ends in one clear line, and the last checkpoint stays complete."""

from __future__ import annotations

import io
import json
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from PIL import Image

from gdino_hf.cli import main
from gdino_hf.data.reproducible_sampling import ReproducibleSampler
from gdino_hf.training.saving import UNFINISHED, last_checkpoint


def error_of(capsys):
    """Return the one error line on stderr, without progress bars and warnings."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line or "Traceback" in line]
    assert len(lines) == 1, lines
    return lines[0]


def damage(path):
    """Truncate an image file, which is noticed only when the image is decoded."""
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(stream, "jpeg", quality=95)
    path.write_bytes(stream.getvalue()[:1500])


def damage_inside(path):
    """Damage the middle of an image file, which no check before training notices unless it decodes every image."""
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(stream, "png")
    content = bytearray(stream.getvalue())
    middle = len(content) // 2
    content[middle : middle + 16] = bytes(16)
    path.write_bytes(bytes(content))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_full_disk_stops_with_one_line_and_the_last_checkpoint_intact(options, tmp_path, capsys, one_thread):
    run = tmp_path / "runs" / "train" / "full"
    assert main([*options, "--name", "full", "--max_steps", "2", "--save_steps", "2"]) == 0
    before = contents(run / "checkpoint-2")
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Files may not grow beyond 100 kB, which the weights exceed: to the process that looks like a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        status = main(["train", "--resume", str(run), "--max_steps", "4"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1
    line = error_of(capsys)
    assert "cannot be written" in line
    assert "checkpoint-2 is complete" in line
    assert "--resume" in line
    assert contents(run / "checkpoint-2") == before
    assert not (run / UNFINISHED).exists()
    assert last_checkpoint(run) == run / "checkpoint-2"
    assert main(["train", "--resume", str(run), "--max_steps", "4"]) == 0
    assert last_checkpoint(run) == run / "checkpoint-4"


def test_broken_image_stops_with_one_line_and_the_last_checkpoint_intact(options, drawn, tmp_path, capsys):
    # The image that comes last in the epoch, so that a checkpoint is written before it.
    broken = drawn / "images" / f"train{list(ReproducibleSampler(12, seed=42))[-1].row}.png"
    whole = broken.read_bytes()
    damage_inside(broken)
    assert main([*options, "--name", "broken", "--max_steps", "4", "--save_steps", "1"]) == 1
    line = error_of(capsys)
    assert broken.name in line
    assert "--resume" in line
    run = tmp_path / "runs" / "train" / "broken"
    # The data loader reads a batch ahead.
    assert last_checkpoint(run).name in ("checkpoint-1", "checkpoint-2")
    broken.write_bytes(whole)
    assert main(["train", "--resume", str(run)]) == 0


def test_image_that_is_cut_off_is_named_before_training(options, drawn, capsys):
    damage(drawn / "images" / "train3.png")
    assert main([*options, "--max_steps", "3"]) == 2
    assert "train3.png" in error_of(capsys)


@pytest.mark.parametrize("harm", [damage, damage_inside])
def test_broken_image_can_be_skipped(options, drawn, harm):
    harm(drawn / "images" / "train3.png")
    assert main([*options, "--max_steps", "3", "--unreadable", "skip"]) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["train"], "no data set"),
        (["train", "nowhere"], "nowhere does not exist"),
        (["train", "{drawn}", "--model", "nowhere"], "--model nowhere"),
        (["train", "{drawn}", "--freeze", "head"], "no parameter group 'head'"),
        (["train", "{drawn}", "--ema_decay", "1"], "ema_decay must be"),
        (["train", "{drawn}", "--replay", "nowhere"], "--replay nowhere"),
        (["train", "{drawn}", "--replay-share", "1"], "replay_share must be"),
        (["train", "{drawn}", "--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["train", "--resume", "nowhere"], "nowhere"),
        (["train", "{drawn}", "--image-size", "8"], "image_size must be"),
        (["train", "{drawn}", "--name", "a/b"], "--name"),
        (["train", "{drawn}", "--augment", "some"], "invalid choice: 'some'"),
        (["train", "{drawn}", "--lerning-rate", "1"], "--lerning-rate"),
        (["train", "{drawn}", "--learning-rate", "-1"], "learning_rate must be"),
        (["train", "{drawn}", "--batch-size", "0"], "per_device_train_batch_size must be"),
        (["train", "{drawn}", "--epochs", "0"], "num_train_epochs must be"),
        (["train", "{drawn}", "--minutes", "0"], "minutes must be"),
        (["train", "{drawn}", "--save-strategy", "best", "--metric-for-best-model", "x"], "must be one of AP"),
        (["train", "{tiny}", "--freeze", "text", "backbone", "trunk"], "All parameters are frozen"),
        (["train", "{tiny}", "--streaming"], "streaming needs an end"),
        (["train", "{tiny}", "--val", "{drawn}/captions.jsonl", "--eval-strategy", "epoch"], "eval_strategy needs"),
        (["train", "{tiny}", "--zero-shot", "{drawn}/captions.jsonl"], "--zero-shot"),
        (["train", "{tiny}", "--report-to", "nowhere"], "nowhere is not supported"),
        (["train", "{tiny}", "--lr-scheduler-kwargs", '{"a": 1}'], "'a'"),
    ],
)
def test_mistake_on_the_command_line_is_one_line_and_status_2(
    arguments, reason, drawn, tiny_folder, tmp_path, capsys, monkeypatch
):
    region = {"bbox": [0, 0, 32, 64], "phrase": "a cat", "tokens_positive": [[0, 5]]}
    line = {"filename": "val0.png", "height": 64, "width": 64, "grounding": {"caption": "a cat", "regions": [region]}}
    (drawn / "captions.jsonl").write_text(json.dumps(line))
    monkeypatch.chdir(tmp_path)
    whole = [word for part in arguments for word in (["{drawn}", "--model", "{model}"] if part == "{tiny}" else [part])]
    assert main([word.replace("{drawn}", str(drawn)).replace("{model}", str(tiny_folder)) for word in whole]) == 2
    assert reason in error_of(capsys)
    # A run that did nothing leaves no folder behind.
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("learning-rat: 0.1", "did you mean learning-rate"),
        ("augment: some", "invalid choice: 'some'"),
        ("gradient_accumulation_steps: 1.5", "invalid int value: '1.5'"),
        ("weight_decay: [1]", "invalid float value"),
        ("num_train_epochs:", "no value for num_train_epochs"),
        ("image_size: 64x64", "invalid int value: '64x64'"),
        ("- a", "holds a list"),
        ("a: [", "line 1"),
        ("output_dir: here", "output_dir"),
    ],
)
def test_mistake_in_yaml_is_one_line_that_names_the_file(content, reason, options, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(content)
    assert main([*options, "--config", str(config)]) == 2
    line = error_of(capsys)
    assert reason in line
    assert str(config) in line
    assert not (tmp_path / "runs").exists()


def test_missing_image_is_named_before_training(options, drawn, capsys):
    (drawn / "images" / "train5.png").unlink()
    assert main(options) == 2
    line = error_of(capsys)
    assert "missing files" in line
    assert "train5.png" in line


def test_flags_win_over_yaml_and_a_run_remembers_both(options, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "max-steps: 50\nlearning_rate: 3e-4\nfreeze: backbone\naugment: none\nepochs: 3\nsave_strategy: no\n"
        "lr_scheduler_kwargs: {num_cycles: 0.4}\nname: both\n"
    )
    assert main([*options, "--config", str(config), "--max-steps", "1"]) == 0
    stored = yaml.safe_load((tmp_path / "runs" / "train" / "both" / "arguments.yaml").read_text())
    assert (stored["max_steps"], stored["freeze"], stored["augment"]) == (1, ["backbone"], "none")
    assert (stored["num_train_epochs"], stored["save_strategy"]) == (3, "no")
    # The options fixture passes --learning-rate, which wins over the file.
    assert stored["learning_rate"] == 1e-3


def test_runs_never_overwrite_each_other(options, tmp_path):
    for _ in range(2):
        assert main([*options, "--name", "same", "--max_steps", "1"]) == 0
    assert sorted(path.name for path in (tmp_path / "runs" / "train").iterdir()) == ["same", "same-2"]


def test_interrupted_by_the_user_it_says_how_to_resume(options, tmp_path, capsys):
    run = tmp_path / "runs" / "train" / "stopped"

    def stop():
        while last_checkpoint(run) is None and main_thread.is_alive():
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    main_thread = threading.main_thread()
    threading.Thread(target=stop, daemon=True).start()
    assert main([*options, "--name", "stopped", "--max_steps", "100000", "--save_steps", "2"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"stopped; --resume {run} goes on from checkpoint-")


def test_half_written_checkpoint_is_ignored(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    shutil.rmtree(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path).name == "checkpoint-9"


def test_without_the_extra_it_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['accelerate'] = None; from gdino_hf.cli import main; sys.exit(main(['train', 'x']))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].endswith('training needs accelerate; pip install "gdino-hf[train]"')
    assert "Traceback" not in run.stderr
