"""Claims about the Triton backend: it equals float64 in the interpreter and compiles without a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gdino_hf.model import msda_triton

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def triton():
    if importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed: pip install triton"
        if os.environ.get("GDINO_REQUIRE_TRITON") == "1":
            pytest.fail(f"GDINO_REQUIRE_TRITON=1, but {reason}")
        pytest.skip(reason)
    import triton

    return triton


@pytest.mark.slow
@pytest.mark.parametrize("marked", ["not soak", pytest.param("soak", marks=pytest.mark.soak)])
def test_kernels_equal_float64_in_the_interpreter(triton, marked):
    file = str(HERE / "interpreted_msda_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS", "GDINO_MSDA"):
        environment.pop(name, None)
    run = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout)
    assert "skipped" not in run.stdout


def compile_kernel(triton, function, capability, dtype, geometry, levels=2, points=4, width=32):
    """Compile a kernel as it is launched on 16-byte aligned tensors with 8 heads and inputs in the value's dtype."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    geometry_dtype = "fp32" if geometry == 0 else dtype
    pointers = dict.fromkeys(("grad_output", "value", "output"), f"*{dtype}")
    pointers |= dict.fromkeys(("places", "scores", "grad_places", "grad_scores"), f"*{geometry_dtype}")
    pointers |= dict.fromkeys(("references", "grad_value", "grad_references"), "*fp32")
    constants = {
        "HEADS": 8,
        "WIDTH": width,
        "LEVELS": levels,
        "POINTS": points,
        "GEOMETRY": geometry,
        "REFERENCE_GRADIENT": geometry == 4,
        "ROWS": 1024 // width,
        "CHANNELS": width,
        "COLUMNS": levels * points,
    }
    signature = {name: pointers.get(name, "i32") for name in function.arg_names}
    signature["sizes"] = ("i32",) * (2 * levels)
    constants = {name: value for name, value in constants.items() if name in signature}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name in pointers}
    source = ASTSource(function, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


# Each capability and each dtype once; the other pairs with -m soak.
PAIRS = {80: ("fp32", 4), 90: ("fp16", 0), 100: ("bf16", 2)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "geometry"),
    [
        pytest.param(capability, *pair, marks=() if PAIRS[capability] == pair else pytest.mark.soak)
        for capability in PAIRS
        for pair in PAIRS.values()
    ],
)
def test_kernels_compile_without_a_gpu(triton, capability, dtype, geometry, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from gdino_hf.model.msda_triton_kernels import backward_kernel, forward_kernel

    for function in (forward_kernel, backward_kernel):
        compiled = compile_kernel(triton, function, capability, dtype, geometry)
        assert compiled.asm["cubin"][:4] == b"\x7fELF"
        # Values are read in 16-byte pieces, and from Hopper on their gradients are accumulated in 16-byte pieces.
        assert re.search(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"])
        if function is backward_kernel and capability >= 90:
            assert re.search(r"atom\.global\S*\.add\.v4\.f32", compiled.asm["ptx"])


def test_missing_triton_is_logged_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    msda_triton.load.cache_clear()
    try:
        with caplog.at_level("INFO", logger=msda_triton.__name__):
            assert msda_triton.load() is None
            assert msda_triton.load() is None
        assert len(caplog.records) == 1
    finally:
        msda_triton.load.cache_clear()
