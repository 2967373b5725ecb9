"""Damaged and hostile files are refused by `gdino convert` in one sentence, without a traceback and at once."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from published import SMALL, mmdet, original
from synthetic import state_dict

from gdino_hf.cli import main
from gdino_hf.conversion import command
from gdino_hf.conversion.conversion_error import ConversionError
from gdino_hf.conversion.engine import convert

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def state():
    return state_dict(original(SMALL))


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A sharded model folder."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "shard.safetensors")}))
    return folder


def refused(capsys, source, target, *options):
    capsys.readouterr()
    assert main(["convert", str(source), str(target), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gdino convert: error: ")
    assert error.count("\n") == 1
    assert not target.exists()
    return error


def test_the_folder_itself_is_fine(folder, tmp_path):
    assert main(["convert", str(folder), str(tmp_path / "out.pth"), "--to-original"]) == 0


@pytest.mark.parametrize("weight_map", [None, [], ["shard.safetensors"], {}, {"a": 3, "b": 4}, {"a": None}, "x", 5])
def test_a_weight_map_of_another_kind(weight_map, folder, tmp_path, capsys):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert INDEX in refused(capsys, folder, tmp_path / "out.pth", "--to-original")


@pytest.mark.parametrize("name", ["../../x.safetensors", "../shard.safetensors", "/etc/passwd", "C:\\x.safetensors"])
def test_an_index_that_leaves_its_folder(name, folder, tmp_path, capsys):
    shutil.copy(folder / "shard.safetensors", tmp_path / "shard.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert "outside its folder" in refused(capsys, folder, tmp_path / "out.pth", "--to-original")


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "", "{", "3", "[]", "\x00", "{'a': 1}"])
def test_json_that_is_none(name, text, folder, tmp_path, capsys):
    (folder / name).write_text(text)
    assert name in refused(capsys, folder, tmp_path / "out.pth", "--to-original")


@pytest.mark.parametrize("depth", [10, 100_000])
def test_a_config_option_that_is_none(depth, state, tmp_path, capsys):
    torch.save({"model": state}, tmp_path / "theirs.pth")
    (tmp_path / "given.json").write_text("[" * depth)
    error = refused(capsys, tmp_path / "theirs.pth", tmp_path / "ours", "--config", str(tmp_path / "given.json"))
    assert "--config" in error


@pytest.mark.parametrize(
    "content",
    [
        b"a text file\n",
        b"# pickle?\n",
        b"{}",
        b"import os\n",
        b"\x80",
        b"\x80\x02.",
        b"PK",
        b"(" * 5000,
        b"\x93NUMPY" * 9,
    ],
)
@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.bin", "x.safetensors", "x"])
def test_a_file_that_is_no_checkpoint(content, name, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    error = refused(capsys, tmp_path / name, tmp_path / "ours")
    assert str(tmp_path / name) in error


KEYS = {
    "integers": lambda state: dict(enumerate(state.values())),
    "an integer": lambda state: {**state, 3: torch.ones(1)},
    "a tuple": lambda state: {**state, ("a", "b"): torch.ones(1)},
    "bytes": lambda state: {**state, b"a": torch.ones(1)},
    "a layer of a long number": lambda state: {
        **state,
        f"transformer.decoder.layers.{'9' * 5000}.norm1.bias": torch.ones(1),
    },
    "a layer of a large number": lambda state: {
        **state,
        "transformer.decoder.layers.999999999.norm1.bias": torch.ones(1),
    },
    "an encoder layer of a large number": lambda state: {
        **state,
        "transformer.encoder.layers.999999999.norm1.bias": torch.ones(1),
    },
    "a block of a large number": lambda state: {
        **state,
        "backbone.0.layers.0.blocks.999999999.norm1.bias": torch.ones(1),
    },
    "a text layer of a large number": lambda state: {
        **state,
        "bert.encoder.layer.999999999.output.dense.bias": torch.ones(1),
    },
    "a level of a large number": lambda state: {**state, "input_proj.999999999.0.bias": torch.ones(1)},
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_of_another_kind(case, state, tmp_path, capsys):
    torch.save({"model": KEYS[case](state)}, tmp_path / "theirs.pth")
    assert "theirs.pth" in refused(capsys, tmp_path / "theirs.pth", tmp_path / "ours")


VALUES = {
    "nan": lambda tensor: tensor.fill_(float("nan")),
    "infinity": lambda tensor: tensor.fill_(float("inf")),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "sparse": lambda tensor: tensor.to_sparse(),
    "integers": lambda tensor: tensor.to(torch.int32),
    "empty": lambda tensor: torch.empty(0, 10**12),
    "no dimension": lambda tensor: torch.tensor(1.0),
}


@pytest.mark.parametrize("case", [name for name in VALUES if name != "integers"])
@pytest.mark.parametrize("key", ["feat_map.weight", "transformer.encoder.layers.0.self_attn.attention_weights.bias"])
def test_tensors_of_another_kind(case, key, tmp_path, capsys):
    state = state_dict(original(SMALL))
    state[key] = VALUES[case](state[key])
    torch.save({"model": state}, tmp_path / "theirs.pth")
    assert key.split(".")[-2] in refused(capsys, tmp_path / "theirs.pth", tmp_path / "ours")


def test_nan_in_a_derived_or_fused_tensor_is_named(tmp_path, capsys):
    state = state_dict(mmdet(SMALL))
    state["decoder.layers.1.self_attn.attn.in_proj_bias"][5] = float("nan")
    torch.save({"state_dict": state}, tmp_path / "theirs.pth")
    error = refused(capsys, tmp_path / "theirs.pth", tmp_path / "ours")
    assert "decoder.layers.1.self_attn.attn.in_proj_bias holds NaN or infinity" in error


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "null", '{"version": 3}'])
def test_other_damaged_files_of_a_folder(name, text, folder, tmp_path, capsys):
    (folder / name).write_text(text)
    capsys.readouterr()
    status = main(["convert", str(folder), str(tmp_path / "out"), "--to-transformers"])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    # A tokenizer that cannot be loaded is left out, with a warning.
    assert status == 2 or "No tokenizer is saved" in error or (tmp_path / "out" / "tokenizer.json").is_file()


def test_numbers_stored_in_a_dtype_that_torch_lacks(folder, tmp_path, capsys):
    tensors = load_file(folder / "shard.safetensors")
    save_file({key: tensor.to(torch.complex64) for key, tensor in tensors.items()}, folder / "shard.safetensors")
    assert "is stored as C64" in refused(capsys, folder, tmp_path / "out.pth", "--to-original")


@pytest.mark.parametrize("key", ["\x1b[2Jevil", "a\nb.weight", "x\u202e", "k" * 501], ids=ascii)
def test_names_of_tensors_that_a_terminal_would_act_on(key, state, tmp_path):
    for suffix, write in ((".pth", torch.save), (".safetensors", save_file)):
        source = tmp_path / f"theirs{suffix}"
        write({**state, key: torch.zeros(3)}, source)
        with pytest.raises(ConversionError, match="holds a tensor named") as caught:
            convert(str(source), str(tmp_path / "ours"))
        assert str(caught.value).isprintable()
    assert not (tmp_path / "ours").exists()


def test_names_of_other_entries_are_escaped_in_report_and_messages(state, tmp_path, capsys):
    torch.save({"model": state, "\x1b[2Jstep": 3}, tmp_path / "theirs.pth")
    arguments = argparse.ArgumentParser()
    command.add_arguments(arguments)
    # As the scripts in conversion/ run it, without the streams of `gdino` that escape everything.
    assert command.run(arguments.parse_args([str(tmp_path / "theirs.pth"), str(tmp_path / "ours")])) == 0
    assert r"\x1b[2Jstep" in capsys.readouterr().out
    for content in ({"\x1b[2Ja": state, "\x1b[2Jb": state}, {"\x1b[2J": 3}, {"model": {**state, "\x1b": 3}}):
        torch.save(content, tmp_path / "theirs.pth")
        with pytest.raises(ConversionError) as caught:
            convert(str(tmp_path / "theirs.pth"), str(tmp_path / "other"))
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "adapter_model.safetensors"])
def test_weights_that_are_a_link_to_a_file_outside(name, folder, tmp_path, capsys):
    (folder / INDEX).unlink()
    shutil.move(folder / "shard.safetensors", tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    assert "is a link to a file outside its folder" in refused(capsys, folder, tmp_path / "out.pth", "--to-original")


def test_stored_tensors_that_are_a_link_to_a_file_outside(state, tmp_path, capsys):
    torch.save({"model": {**state, "label_enc.weight": torch.ones(2, 64)}}, tmp_path / "theirs.pth")
    assert main(["convert", str(tmp_path / "theirs.pth"), str(tmp_path / "ours")]) == 0
    kept = tmp_path / "ours" / "conversion.safetensors"
    shutil.move(kept, tmp_path / "secret")
    kept.symlink_to(tmp_path / "secret")
    error = refused(capsys, tmp_path / "ours", tmp_path / "back.pth", "--to-original")
    assert "is a link to a file outside its folder" in error


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", b"---\nlicense: \xe9\n---\n", b"\x00" * 9])
def test_a_card_that_is_not_utf_8_does_not_matter(text, folder, tmp_path):
    (folder / "README.md").write_bytes(text)
    assert main(["convert", str(folder), str(tmp_path / "out.pth"), "--to-original"]) == 0


def test_a_record_that_is_nested_deeply(state, tmp_path, capsys):
    torch.save({"model": state}, tmp_path / "theirs.pth")
    assert main(["convert", str(tmp_path / "theirs.pth"), str(tmp_path / "ours")]) == 0
    (tmp_path / "ours" / "conversion.json").write_text("[" * 100_000)
    assert "is damaged" in refused(capsys, tmp_path / "ours", tmp_path / "back.pth", "--to-original")
