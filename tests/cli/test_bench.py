"""`gdino bench`: every stage has its time, and transformers' own model can stand beside ours."""

import json

import pytest
import torch
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

from gdino_hf import NANO, GDinoProcessor
from gdino_hf.cli import main
from gdino_hf.cli.bench import STAGES
from tiny_peers import tiny_bert, tiny_peer_config, tiny_swin


@pytest.fixture
def peer_folder(tmp_path):
    """A tiny checkpoint as transformers writes it, with a processor."""
    config = tiny_peer_config(GroundingDinoConfig, tiny_swin(), tiny_bert(30522))
    torch.manual_seed(0)
    GroundingDinoForObjectDetection(config).save_pretrained(tmp_path)
    # transformers knows BERT's own special tokens only, and gdino-nano's vocabulary is BERT's.
    GDinoProcessor.from_pretrained(NANO).save_pretrained(tmp_path)
    return tmp_path


def test_every_stage_has_its_time(tiny_folder, tmp_path, capsys):
    report = tmp_path / "out" / "report.json"
    command = ["bench", "--model", str(tiny_folder), "--size", "64", "96", "--batch", "2", "--repeats", "2"]
    assert main([*command, "--labels", "cat, dog", "--device", "cpu", "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert set(found["stages"]) == set(STAGES)
    assert all(stage["milliseconds"] > 0 for stage in found["stages"].values())
    total = found["total"]
    assert total["images_per_second"] == pytest.approx(2 / (total["milliseconds"] / 1e3))
    assert (found["size"], found["batch"], found["optimized"]) == ([64, 96], 2, True)
    printed = capsys.readouterr().out
    assert all(stage in printed for stage in STAGES)


def test_the_backend_that_samples_is_named(tiny_folder, capsys, monkeypatch):
    monkeypatch.setenv("GDINO_MSDA", "torch")
    command = ["bench", "--model", str(tiny_folder), "--size", "64", "96", "--repeats", "1", "--device", "cpu"]
    assert main(command) == 0
    assert "deformable attention in torch" in capsys.readouterr().out


def test_transformers_runs_in_turn(peer_folder, tmp_path, capsys):
    report = tmp_path / "report.json"
    command = ["bench", "--model", str(peer_folder), "--size", "64", "96", "--repeats", "1", "--device", "cpu"]
    assert main([*command, "--plain", "--against", "transformers", "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    against = found["against"]
    assert set(against["seconds"]) == {"transformers float32", "gdino_hf float32"}
    assert against["ratio"]["gdino_hf float32"] == 1.0
    assert against["ratio"]["transformers float32"] == pytest.approx(
        against["seconds"]["transformers float32"] / against["seconds"]["gdino_hf float32"]
    )
    assert against["largest_feature_difference"] < 1e-4
    assert against["same_queries"] > 0.5
    assert against["boxes_within_a_pixel"] > 0.9
    assert not found["optimized"]
    assert "times ours" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["nano", "folder"])
def test_a_checkpoint_that_transformers_cannot_read_is_refused_before_anything_is_timed(model, tiny_folder, capsys):
    where = str(tiny_folder) if model == "folder" else model
    assert main(["bench", "--model", where, "--size", "64", "64", "--repeats", "1", "--against", "transformers"]) == 2
    printed = capsys.readouterr()
    assert "needs a checkpoint that transformers reads, not one of type gdino" in printed.err
    assert printed.out == ""


def test_sizes_are_whole_numbers(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--size", "0", "64"])
    assert "'0' is not a whole number of at least 1" in capsys.readouterr().err
