"""Tests of the GPU benchmark: it refuses to run without a GPU, and its parts work on a CPU with small shapes."""

import os
import subprocess
import sys

import pytest
import torch


@pytest.fixture
def benchmarks(cases, monkeypatch):
    """The modules of the script, which import each other by name."""
    monkeypatch.syspath_prepend(str(cases.PROJECT / "benchmarks"))
    names = ("measure", "operators", "models")
    yield {name: __import__(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


def test_without_a_gpu_it_refuses_in_one_sentence(cases, tmp_path):
    command = [sys.executable, str(cases.PROJECT / "benchmarks" / "run_gpu.py"), "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.strip() == "This PyTorch finds no GPU, so nothing is measured: run it on a machine with CUDA."
    assert not list(tmp_path.iterdir())


def test_operators_are_checked_and_timed(benchmarks, monkeypatch):
    operators, measure = benchmarks["operators"], benchmarks["measure"]
    monkeypatch.delenv("GDINO_MSDA", raising=False)
    shape = 1, [(6, 8), (3, 4)], 2, 16, 2, None
    with operators.backend("c"):
        c_runs = operators.backend_for(*operators.make_inputs(shape, torch.float32, "cpu")["plain"][:2]) == "c"
    for kind in ("plain", "fused") if c_runs else ():
        errors = operators.check("c", kind, shape, torch.float32, "cpu")
        assert max(errors.values()) < 1e-4
    with pytest.raises(RuntimeError, match="triton does not run here"):
        operators.check("triton", "plain", shape, torch.float32, "cpu")
    bandwidth = measure.copy_bandwidth("cpu", 2**20)
    rows = operators.time_shape(shape, torch.float32, "cpu", ["c"], bandwidth, 1)
    assert [row["pass"] for row in rows] == ["forward", "forward and backward"]
    for row in rows:
        assert set(row["milliseconds"]) == {"grid_sample", "c"}
        assert all(time > 0 for time in row["milliseconds"].values())
        assert row["copy limit"] > 0


def test_failing_peer_is_reported_and_not_raised(benchmarks):
    def broken():
        raise ValueError("no such kernel\nmore")

    result = benchmarks["measure"].alternate({"good": lambda: None, "bad": broken}, "cpu", 3)
    assert result["good"] >= 0
    assert result["bad"] == "ValueError: no such kernel"


def test_published_shapes_agree(benchmarks):
    ours, theirs = benchmarks["models"].published_shape()
    for name in (
        "d_model",
        "encoder_layers",
        "decoder_layers",
        "num_queries",
        "num_feature_levels",
        "encoder_n_points",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.slow
def test_models_are_timed(benchmarks):
    from transformers import BertConfig, GroundingDinoConfig, SwinConfig

    from gdino_hf import GDinoConfig

    def parts():
        text = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        vision = SwinConfig(
            embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_indices=[2, 3, 4]
        )
        return {
            "backbone_config": vision,
            "text_config": text,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "num_queries": 10,
        }

    configs = GDinoConfig(**parts()), GroundingDinoConfig(**parts())
    rows = benchmarks["models"].time_models(
        configs, torch.float32, "cpu", [], batches=(1,), size=(96, 128), repeats=1, modes=("eager",)
    )
    assert [row["mode"] for row in rows] == ["eager"]
    assert set(rows[0]["milliseconds"]) == {"transformers", "gdino_hf torch"}
    assert all(isinstance(time, float) for time in rows[0]["milliseconds"].values()), rows
