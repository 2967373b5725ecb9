"""Heads and points of deformable attention are found, though tensors show only their product with the levels."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from published import SMALL, mmdet, original
from synthetic import assert_same, state_dict

from gdino_hf import GDinoConfig, GDinoForObjectDetection
from gdino_hf.cli import main
from gdino_hf.conversion.conversion_error import ConversionError
from gdino_hf.conversion.engine import Options, convert
from gdino_hf.model.ms_deform_attn import MSDeformAttn


def source(tmp_path, heads, points, layout="original", pattern=False, **sizes):
    """Write a checkpoint whose sampling offsets have the initial pattern of their heads and points, or none."""
    wanted = replace(SMALL, heads=heads, points=points, **sizes)
    state = state_dict(original(wanted) if layout == "original" else mmdet(wanted))
    if pattern:
        initial = MSDeformAttn(wanted.d_model, wanted.levels, heads, points).initial_offsets()
        for key in state:
            if key.endswith("sampling_offsets.bias"):
                state[key] = initial + 0.2 * torch.randn(initial.shape, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "theirs.pth"
    torch.save({"model" if layout == "original" else "state_dict": state}, path)
    return path, state


def sizes_of(folder):
    config = GDinoConfig.from_pretrained(folder)
    return (
        (config.encoder_attention_heads, config.encoder_n_points),
        (config.decoder_attention_heads, config.decoder_n_points),
    )


@pytest.mark.parametrize(
    ("layout", "heads", "points"),
    [
        *(("original", *split) for split in ((8, 3), (8, 4), (8, 5), (4, 4), (16, 4), (8, 7))),
        *(("mmdet", *split) for split in ((8, 5), (16, 4))),
    ],
)
def test_the_published_number_of_points_or_heads_is_taken(heads, points, layout, tmp_path):
    path, state = source(tmp_path, heads, points, layout)
    report = convert(path, tmp_path / "ours")
    assert sizes_of(tmp_path / "ours") == ((heads, points), (heads, points))
    assert sum(f"{heads} heads of {points} points" in sentence for sentence in report.assumed) == 2
    assert all("--config" in sentence for sentence in report.assumed)
    convert(tmp_path / "ours", tmp_path / "back.pth", to=layout)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert_same(next(iter(back.values())), state)


@pytest.mark.parametrize(("heads", "points"), [(8, 2), (16, 2), (4, 8), (2, 4), (4, 3), (32, 1), (2, 6)])
def test_other_splits_are_recognized_by_the_pattern_of_the_offsets(heads, points, tmp_path):
    path, _ = source(tmp_path, heads, points, pattern=True)
    convert(path, tmp_path / "ours")
    assert sizes_of(tmp_path / "ours") == ((heads, points), (heads, points))
    GDinoForObjectDetection.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("levels", [1, 3, 5])
def test_any_number_of_levels(levels, tmp_path):
    path, _ = source(tmp_path, 8, 3, levels=levels, stages=(1, 2, 3)[-levels:])
    convert(path, tmp_path / "ours")
    assert GDinoConfig.from_pretrained(tmp_path / "ours").num_feature_levels == levels
    assert sizes_of(tmp_path / "ours") == ((8, 3), (8, 3))


def test_config_overrules_the_choice(tmp_path):
    path, _ = source(tmp_path, 8, 4)
    convert(path, tmp_path / "ours", options=Options(overrides={"encoder_attention_heads": 16, "decoder_n_points": 8}))
    assert sizes_of(tmp_path / "ours") == ((16, 2), (4, 8))


@pytest.mark.parametrize(("given", "status"), [({}, 2), ({"encoder_attention_heads": 6}, 2), ({"d_model": 12}, 2)])
def test_what_no_split_fits_is_refused_and_config_is_named(given, status, capsys, tmp_path):
    # 3 heads of 1 point: an odd number of heads has no half for fusion, and 1 head is odd too.
    path, _ = source(tmp_path, 3, 1)
    (tmp_path / "given.json").write_text(json.dumps(given))
    assert main(["convert", str(path), str(tmp_path / "ours"), "--config", str(tmp_path / "given.json")]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--config" in error
    assert not (tmp_path / "ours").exists()


def test_a_contradiction_of_config_is_said(tmp_path):
    path, _ = source(tmp_path, 8, 4)
    with pytest.raises(ConversionError, match=r"samples 128 places per query.*as --config says.*--config"):
        convert(path, tmp_path / "ours", options=Options(overrides={"encoder_attention_heads": 24}))
