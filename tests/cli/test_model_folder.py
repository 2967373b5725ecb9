"""`--model FOLDER` of detect, eval and train: a folder that cannot be used is refused before any work."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from gdino_hf.cli import main


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def change_json(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def nan(folder):
    state = load_file(folder / "model.safetensors")
    state["model.enc_output.bias"][0] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def no_std(folder):
    change_json(folder / "processor_config.json", lambda c: c["image_processor"].update(image_std=[0, 0.2, 0.2]))


def outside(folder):
    shutil.move(folder / "model.safetensors", folder.parent / "x.safetensors")
    keys = load_file(folder.parent / "x.safetensors")
    index = {"weight_map": dict.fromkeys(keys, "../x.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def layers(folder):
    change_json(folder / "config.json", lambda c: c.update(encoder_layers=10**9))


def words(folder):
    change_json(folder / "tokenizer.json", lambda c: c["model"]["vocab"].update({"zebra": 5000}))


def another_config(folder):
    change_json(folder / "config.json", lambda c: c.update(decoder_ffn_dim=128))


def pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text("not a checkpoint\n")


CASES = {
    nan: "1 of its tensors hold NaN or infinity, for instance model.enc_output.bias",
    no_std: "image_std is [0.0, 0.2, 0.2]; pixels are divided by it",
    outside: "names '../x.safetensors', which lies outside its folder",
    layers: "encoder_layers must be at most 200, got 1,000,000,000",
    words: "its tokenizer numbers words up to 5000, but the text encoder has",
    another_config: "of shape (64,), but config.json describes (128,)",
    pickle: "pytorch_model.bin",
}


@pytest.mark.parametrize("damage", CASES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("verb", ["detect", "eval", "train"])
def test_the_cause_is_named(verb, damage, folder, tmp_path, capsys, example_folder, monkeypatch):
    damage(folder)
    monkeypatch.chdir(tmp_path)
    annotations = example_folder / "annotations.json"
    arguments = {
        "detect": ["detect", str(example_folder / "cat.jpg"), "--labels", "cat"],
        "eval": ["eval", str(annotations)],
        "train": ["train", str(annotations), "--val", "none", "--test", "none", "--max-steps", "1"],
    }[verb]
    status = main([*arguments, "--model", str(folder)])
    error = capsys.readouterr().err
    assert status == 2, error
    sentence = [line for line in error.splitlines() if "error: " in line]
    assert len(sentence) == 1
    assert CASES[damage] in sentence[0]
    assert "Traceback" not in error
