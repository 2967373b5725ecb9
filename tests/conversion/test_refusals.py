"""Checkpoints that cannot be converted are refused in one sentence that names the cause; the target is unchanged."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from published import SMALL, mmdet, original
from synthetic import state_dict

from gdino_hf.cli import main
from gdino_hf.conversion.conversion_error import ConversionError
from gdino_hf.conversion.engine import convert

MARK = "gdino-malicious-pickle-ran"


class Malicious:
    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


def original_state():
    return state_dict(original(SMALL))


def mmdet_state():
    return state_dict(mmdet(SMALL))


def without(state, key):
    return {name: tensor for name, tensor in state.items() if name != key}


def swin_classifier():
    names = {key.removeprefix("backbone.0."): key for key in original(SMALL) if key.startswith("backbone.0.")}
    state = {name: tensor for name, tensor in zip(names, original_state().values(), strict=False)}  # noqa: C416
    return {**state, "norm.weight": torch.ones(64), "head.weight": torch.ones(1000, 64), "head.bias": torch.ones(1000)}


# Case -> (content of the file, further options, parts that the message must have).
CASES = {
    "preset of another size": (
        lambda: {"model": original_state()},
        ["--preset", "base"],
        ["embed_dim", "base", "--preset"],
    ),
    "preset of another project": (lambda: {"state_dict": mmdet_state()}, ["--preset", "tiny"], ["'tiny'", "--preset"]),
    "unknown preset": (lambda: {"model": original_state()}, ["--preset", "huge"], ["huge", "mm-large"]),
    "missing key": (
        lambda: {"model": without(original_state(), "transformer.level_embed")},
        [],
        ["transformer.level_embed", "fetch"],
    ),
    "missing fused key": (
        lambda: {"model": without(original_state(), "transformer.decoder.layers.1.ca_text.in_proj_bias")},
        [],
        ["transformer.decoder.layers.1.ca_text.in_proj_bias", "fetch"],
    ),
    "missing key of mmdet": (
        lambda: {"state_dict": without(mmdet_state(), "bbox_head.cls_branches.3.bias")},
        [],
        ["bbox_head.cls_branches.3.bias", "fetch"],
    ),
    "missing table of Swin": (
        lambda: {"model": without(original_state(), "backbone.0.layers.1.blocks.0.attn.relative_position_bias_table")},
        [],
        ["backbone.0.layers.1.blocks.0.attn.relative_position_bias_table"],
    ),
    "extra key": (
        lambda: {"model": {**original_state(), "transformer.encoder.gate.weight": torch.ones(2)}},
        [],
        ["transformer.encoder.gate.weight", "take it out"],
    ),
    "extra key of BERT": (
        lambda: {"model": {**original_state(), "bert.adapter.weight": torch.ones(2)}},
        [],
        ["bert.adapter.weight", "take it out"],
    ),
    "extra head": (
        lambda: {"state_dict": {**mmdet_state(), "bbox_head.cls_branches.9.bias": torch.ones(1)}},
        [],
        ["bbox_head.cls_branches.9.bias"],
    ),
    "no state dict": (lambda: {"epoch": 3}, [], ["no tensors", "state_dict"]),
    "not a tensor": (lambda: {"model": {**original_state(), "step": 3}}, [], ["'step'", "int"]),
    "Swin classifier": (lambda: {"model": swin_classifier()}, [], ["Swin image classifier", "head.weight"]),
    "something else": (
        lambda: {"model": {"conv.weight": torch.ones(2, 2)}},
        [],
        ["not a Grounding DINO", "conv.weight"],
    ),
    "malicious entry": (lambda: {"model": original_state(), "hook": Malicious()}, [], ["posix.system", "refused"]),
}
# Keys of every kind, some of which the configuration is inferred from: one wrong shape must not change the inference.
WRONG_SHAPES = {
    "transformer.level_embed": (5, 64),
    "bert.encoder.layer.0.output.dense.weight": (64, 47),
    "backbone.0.patch_embed.proj.weight": (9, 3, 4, 4),
    "backbone.0.layers.1.blocks.1.attn.qkv.weight": (47, 16),
    "backbone.0.layers.1.blocks.1.attn.relative_position_bias_table": (169, 1),
    "input_proj.3.0.weight": (64, 64, 1, 1),
    "feat_map.weight": (63, 64),
    "transformer.tgt_embed.weight": (12, 63),
    "transformer.encoder.layers.1.self_attn.attention_weights.weight": (32, 64),
    "transformer.decoder.layers.0.linear1.weight": (65, 64),
    "bbox_embed.0.layers.2.weight": (5, 64),
    "backbone.0.layers.0.blocks.0.attn.relative_position_index": (16, 15),
}


def refused(capsys, source, target, *options):
    """Convert, check that it is refused and the target unchanged, and return the message."""
    before = contents(target)
    capsys.readouterr()
    status = main(["convert", str(source), str(target), *options])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("gdino convert: error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert contents(target) == before
    assert not [path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}")]
    return error


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} if folder.is_dir() else None


@pytest.mark.parametrize("case", CASES)
def test_refused_with_a_reason(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, options, named = CASES[case]
    torch.save(make(), tmp_path / "theirs.pth")
    error = refused(capsys, tmp_path / "theirs.pth", tmp_path / "ours", *options)
    assert all(part in error for part in [*named, "theirs.pth" if case != "unknown preset" else ""]), error
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("key", WRONG_SHAPES)
def test_tensor_of_the_wrong_shape_is_named(key, capsys, tmp_path):
    state = original_state()
    state[key] = torch.zeros(WRONG_SHAPES[key])
    torch.save({"model": state}, tmp_path / "theirs.pth")
    error = refused(capsys, tmp_path / "theirs.pth", tmp_path / "ours")
    assert f"{key} of " in error
    assert f"{WRONG_SHAPES[key]}, but {tuple(original(SMALL)[key])}" in error


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("suffix", [".pth", ".legacy.pth", ".safetensors"])
def test_truncated_file_is_named(share, suffix, capsys, tmp_path):
    whole, short = tmp_path / f"whole{suffix}", tmp_path / f"short{suffix}"
    if suffix == ".safetensors":
        save_file(original_state(), whole)
    else:
        torch.save({"model": original_state()}, whole, _use_new_zipfile_serialization=suffix == ".pth")
    data = whole.read_bytes()
    short.write_bytes(data[: int(len(data) * share)])
    error = refused(capsys, short, tmp_path / "ours")
    assert f"{short} is truncated or damaged" in error
    assert "fetch it again" in error


@pytest.mark.parametrize("protocol", [2, 4])
def test_malicious_pickle_does_not_run(protocol, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Malicious()}, protocol=protocol))
    error = refused(capsys, tmp_path / "evil.pth", tmp_path / "ours")
    assert "evil.pth" in error
    assert "refused" in error
    assert not (tmp_path / MARK).exists()


def test_missing_source_is_named(capsys, tmp_path):
    error = refused(capsys, tmp_path / "nothing.pth", tmp_path / "ours")
    assert "nothing.pth" in error
    (tmp_path / "empty").mkdir()
    assert "holds none of model.safetensors" in refused(capsys, tmp_path / "empty", tmp_path / "ours")
    assert "no/such-repository" in refused(capsys, Path("no/such-repository"), tmp_path / "ours")


def test_a_folder_with_a_model_is_not_overwritten_by_default(capsys, tmp_path):
    torch.save({"model": original_state()}, tmp_path / "theirs.pth")
    target = tmp_path / "ours"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    convert(tmp_path / "theirs.pth", target)
    assert (target / "notes.txt").read_text() == "mine"
    assert "--overwrite" in refused(capsys, tmp_path / "theirs.pth", target)
    torch.save({"model": without(original_state(), "feat_map.bias")}, tmp_path / "broken.pth")
    assert "feat_map.bias" in refused(capsys, tmp_path / "broken.pth", target, "--overwrite")
    assert main(["convert", str(tmp_path / "theirs.pth"), str(target), "--overwrite"]) == 0
    assert "itself" in refused(capsys, target, target, "--to-transformers", "--overwrite")
    assert "already" in refused(capsys, target, tmp_path / "again")
    assert "name a .pth file" in refused(capsys, target, target.parent, "--to-original")


def test_wrong_model_folders_are_refused(capsys, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"model.text_backbone.x": torch.ones(1)}, folder / "model.safetensors")
    assert "has no config.json" in refused(capsys, folder, tmp_path / "ours")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "'bert'" in refused(capsys, folder, tmp_path / "ours")
    (folder / "config.json").write_text("{")
    assert "config.json is truncated or damaged" in refused(capsys, folder, tmp_path / "ours")


def test_other_layouts_are_not_converted_directly(capsys, tmp_path):
    torch.save({"model": original_state()}, tmp_path / "theirs.pth")
    assert "convert it to ours first" in refused(capsys, tmp_path / "theirs.pth", tmp_path / "x.pth", "--to-mmdet")


def test_a_missing_or_too_large_tokenizer_is_refused(capsys, tiny_tokenizer, tmp_path):
    torch.save({"model": original_state()}, tmp_path / "theirs.pth")
    (tmp_path / "vocab.txt").write_text("".join(f"[unused{i}]\n" for i in range(1200)))
    error = refused(capsys, tmp_path / "theirs.pth", tmp_path / "ours", "--tokenizer", str(tmp_path / "vocab.txt"))
    assert "1100" in error
    error = refused(capsys, tmp_path / "theirs.pth", tmp_path / "ours", "--tokenizer", str(tmp_path / "nowhere"))
    assert "nowhere" in error


def test_damaged_record_is_named(capsys, tmp_path):
    torch.save({"model": original_state()}, tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", tmp_path / "ours")
    (tmp_path / "ours" / "conversion.json").write_text("{}")
    error = refused(capsys, tmp_path / "ours", tmp_path / "back.pth", "--to-original")
    assert "conversion.json" in error
    assert "delete it" in error


def test_pushing_without_the_hub_is_refused_before_converting(capsys, tmp_path):
    torch.save({"model": original_state()}, tmp_path / "theirs.pth")
    error = refused(capsys, tmp_path / "theirs.pth", tmp_path / "ours", "--push-to-hub", "me/model")
    assert "me/model" in error
    error = refused(capsys, tmp_path / "theirs.pth", tmp_path / "x.pth", "--to-mmdet", "--push-to-hub", "me/model")
    assert "--push-to-hub" in error


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32], ids=str)
def test_quantized_weights_are_refused(tmp_path, dtype):
    source = state_dict(original(SMALL))
    key = next(key for key, tensor in source.items() if key.endswith("linear1.weight") and tensor.ndim == 2)
    source[key] = source[key].clamp(0, 1).to(dtype)
    torch.save({"model": source}, tmp_path / "theirs.pth")
    with pytest.raises(ConversionError, match=rf"linear1\.weight is stored as {str(dtype)[6:]}, so the weights are"):
        convert(tmp_path / "theirs.pth", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
