"""The steps that `gdino_hf.conversion` describes for a new layout, with a toy. Copy this file for a real layout."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from published import SMALL, original
from synthetic import assert_same, state_dict

from gdino_hf import conversion
from gdino_hf.cli import main
from gdino_hf.conversion.engine import convert
from gdino_hf.conversion.key_map import KeyMap
from gdino_hf.conversion.layouts import LAYOUTS, Layout

TABLE = """
net.decoder.layers.{i}.self_attn.qkv.* | model.decoder.layers.{i}.self_attn.{qkv}.* | fused
net.*                                  | model.*
boxes.*                                | bbox_embed.*
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy layout, known to `gdino convert` for the length of a test."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "toy.txt").write_text(TABLE)
    layout = Layout(
        name="toy",
        title="Toy",
        signs=("net.text_backbone.",),
        wrapper="model",
        presets=("tiny",),
        decoder_layer=r"net\.decoder\.layers\.(\d+)\..+",
        backbone_level=r"net\.backbone\.conv_encoder\.model\.hidden_states_norms\.stage(\d+)\..+",
        box_head=r"boxes\.(\d+)\.(.+)",
        class_bias=r"classes\.(\d+)\.bias",
        source_url="https://example.org/toy",
        table_folder=tmp_path / "keys",
    )
    monkeypatch.setitem(LAYOUTS, "toy", layout)
    return layout


@pytest.fixture
def ours(tmp_path):
    """A folder with a small model of random weights."""
    torch.save({"model": state_dict(original(SMALL))}, tmp_path / "original.pth")
    convert(tmp_path / "original.pth", tmp_path / "ours")
    return tmp_path / "ours"


def as_toy(state):
    """Rename and fuse tensors by hand: what the other project would have stored, without the key table."""
    toy = {}
    for key, tensor in state.items():
        layer, found, name = key.partition(".self_attn.query.")
        if found and "decoder" in layer:
            parts = [state[f"{layer}.self_attn.{part}.{name}"] for part in ("query", "key", "value")]
            toy[f"{layer.replace('model.', 'net.', 1)}.self_attn.qkv.{name}"] = torch.cat(parts)
        elif "decoder" not in key or not any(f".self_attn.{part}." in key for part in ("key", "value")):
            renamed = "net." + key.removeprefix("model.") if key.startswith("model.") else key
            toy[renamed.replace("bbox_embed.", "boxes.", 1) if renamed.startswith("bbox_embed.") else renamed] = tensor
    return toy


def test_a_toy_checkpoint_is_recognized_converted_and_written_back(toy, ours, tmp_path, capsys):
    state = load_file(ours / "model.safetensors")
    theirs = as_toy(state)
    torch.save({"model": theirs}, tmp_path / "toy.pth")
    assert main(["convert", str(tmp_path / "toy.pth"), str(tmp_path / "converted")]) == 0
    assert "toy -> gdino" in capsys.readouterr().out
    assert_same(load_file(tmp_path / "converted" / "model.safetensors"), state)
    assert main(["convert", str(tmp_path / "converted"), str(tmp_path / "back.pth"), "--to-toy"]) == 0
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True)["model"], theirs)


def test_a_key_without_a_line_is_named(toy, ours, tmp_path, capsys):
    theirs = {**as_toy(load_file(ours / "model.safetensors")), "extra.weight": torch.ones(1)}
    torch.save({"model": theirs}, tmp_path / "toy.pth")
    assert main(["convert", str(tmp_path / "toy.pth"), str(tmp_path / "converted")]) == 2
    assert "toy.pth holds extra.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("net.* | model.* | guess", "names the rule 'guess'; the rules are rename, fused"),
        ("net.*", "Line 1 has 1 columns"),
        ("when heads", "asks for 'heads'; the facts of a configuration are decoder_layers"),
    ],
)
def test_a_malformed_table_is_refused_with_the_choices(line, complaint, toy, tmp_path):
    (tmp_path / "keys" / "toy.txt").write_text(line)
    with pytest.raises(ValueError, match=complaint):
        KeyMap(toy, {"decoder_layers": 6})


def test_the_docstring_shows_the_table_and_the_layout_of_this_test():
    steps = [" ".join(line.split()) for line in conversion.__doc__.splitlines()]
    lines = [" ".join(line.split()) for line in Path(__file__).read_text().splitlines()]
    assert all(" ".join(line.split()) in steps for line in TABLE.split("\n"))
    shown = lines[lines.index('name="toy",') : lines.index('source_url="https://example.org/toy",')]
    assert all(line in steps for line in shown)
