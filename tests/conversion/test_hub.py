"""Pushing a converted folder with the Hub's client, to a server on this machine that stores what it receives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from published import SMALL, original
from synthetic import state_dict

from gdino_hf.cli import main


@pytest.fixture
def command(tiny_tokenizer, tmp_path):
    torch.save({"model": state_dict(original(SMALL))}, tmp_path / "theirs.pth")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--push-to-hub", "me/converted"]
    return ["convert", str(tmp_path / "theirs.pth"), str(tmp_path / "ours"), *options]


def test_all_files_are_pushed_with_a_card_that_names_source_licence_and_conversion(hub, command, tmp_path, capsys):
    assert main(command) == 0
    assert "pushed: " in capsys.readouterr().out
    assert hub.repositories == ["converted"]
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    card = hub.files["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "theirs.pth" in card
    assert "gdino convert" in card


def test_a_refused_push_leaves_the_converted_folder_and_is_reported(hub, command, tmp_path, capsys):
    hub.forbidden = True
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "is converted but not pushed" in error
    assert "me/converted" in error
    assert (tmp_path / "ours" / "model.safetensors").is_file()
