"""Tests of the GPU benchmark: it refuses to run without a GPU, and its parts work on a CPU with small shapes."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch


@pytest.fixture
def benchmarks(cases, monkeypatch):
    """The modules of the script, which import each other by name."""
    monkeypatch.syspath_prepend(str(cases.PROJECT.parent / "benchmarks"))
    names = ("measure", "operators", "models")
    yield {name: __import__(name) for name in names}
    for name in (*names, "run_gpu"):
        sys.modules.pop(name, None)


def test_without_a_gpu_it_refuses_in_one_sentence(cases, tmp_path):
    command = [sys.executable, str(cases.PROJECT.parent / "benchmarks" / "run_gpu.py"), "--out", str(tmp_path)]
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
    for backward in (False, True):
        row = operators.time_shape(shape, torch.float32, "cpu", ["c"], bandwidth, 1, backward=backward)
        assert set(row["milliseconds"]) == {"grid_sample", "c"}
        assert all(time > 0 for time in row["milliseconds"].values())
        assert row["copy limit"] > 0


def test_failing_peer_is_reported_and_not_raised(benchmarks):
    def broken():
        raise ValueError("no such kernel\nmore")

    result = benchmarks["measure"].alternate({"good": lambda: None, "bad": broken}, "cpu", 3)
    assert result["good"] >= 0
    assert result["bad"] == "ValueError: no such kernel"


@pytest.mark.parametrize("shape", ["T", "B", "tiny"])
def test_shapes_of_both_models_agree(benchmarks, shape):
    ours, theirs = benchmarks["models"].configurations(shape)
    for name in (
        "d_model",
        "encoder_layers",
        "decoder_layers",
        "num_queries",
        "num_feature_levels",
        "encoder_n_points",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("embed_dim", "depths", "num_heads", "window_size"):
        assert getattr(ours.backbone_config, name) == getattr(theirs.backbone_config, name), name


def test_rows_without_time_and_failing_rows_say_why(benchmarks, tmp_path):
    def broken():
        raise ValueError("no such kernel\nmore")

    rows = benchmarks["measure"].Rows(tmp_path / "rows", "models", 100)
    rows.add("good", 10, lambda: {"milliseconds": {}})
    rows.add("long", 200, lambda: {"milliseconds": {}})
    rows.add("bad", 10, broken)
    good, long, bad = (json.loads(line) for line in (tmp_path / "rows").read_text().splitlines())
    assert good == {"part": "models", "name": "good", "milliseconds": {}}
    assert long["skipped"].startswith("it needs about 200 s, and ")
    assert bad["failed"] == "ValueError: no such kernel"


def run(cases, folder, *options):
    script = cases.PROJECT.parent / "benchmarks" / "run_gpu.py"
    command = [
        sys.executable,
        str(script),
        "--device",
        "cpu",
        "--tiny",
        "--repeats",
        "1",
        "--out",
        str(folder),
        *options,
    ]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (report,) = folder.glob("*-tiny.json")
    return json.loads(report.read_text()), report.with_suffix(".md").read_text()


def assert_complete(rows):
    """Check that each part has its rows, and that all of them are there but what needs a GPU or a network."""
    assert {row["part"] for row in rows} == {"checks", "operator", "models", "training", "compiled"}
    assert [row for row in rows if "failed" in row] == []
    assert {row["name"] for row in rows if "skipped" in row} == {"hub kernel of this project"}
    times = {name: ms for row in rows for name, ms in row.get("milliseconds", {}).items()}
    # The Hub's kernel cannot be had without a network and a GPU.
    assert {name for name, ms in times.items() if not isinstance(ms, float)} <= {
        "transformers + Hub kernel float32",
        "transformers + Hub kernel bfloat16",
        "transformers bfloat16",
    }
    assert {"gdino_hf optimized float16", "gdino_hf optimized float32", "transformers float32", "grid_sample"} <= set(
        times
    )


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(benchmarks, tmp_path, monkeypatch):
    """In this process; the script gives each part one of its own, which the next test shows for the shortest."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    script = __import__("run_gpu")
    rows = tmp_path / "rows"
    for part in script.PARTS:
        script.run_part(
            argparse.Namespace(part=part, rows=rows, seconds=480.0, device="cpu", repeats=1, tiny=True, kernel=None)
        )
    assert_complete([json.loads(line) for line in rows.read_text().splitlines()])


@pytest.mark.slow
def test_the_rows_of_a_part_are_reported(cases, tmp_path):
    report, page = run(cases, tmp_path, "--parts", "checks")
    assert {row["name"] for row in report["rows"]} >= {"torch plain float32", "c fused float32"}
    assert [row for row in report["rows"] if "failed" in row] == []
    assert f"torch {torch.__version__.split('+')[0]}" in page
    assert "## checks" in page


@pytest.mark.soak
def test_the_whole_script_runs_on_a_cpu(cases, tmp_path):
    report, page = run(cases, tmp_path)
    assert_complete(report["rows"])
    assert f"torch {torch.__version__.split('+')[0]}" in page
    assert all(f"## {part}" in page for part in ("checks", "operator", "models", "training", "compiled"))


def test_a_short_budget_skips_parts_and_says_so(cases, tmp_path):
    report, page = run(cases, tmp_path, "--seconds", "1")
    assert len(report["rows"]) == 5
    assert all("skipped" in row for row in report["rows"])
    assert "skipped: 0 s are left" in page
