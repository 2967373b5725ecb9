"""Tests of the CUDA kernels: arithmetic and indexing, run on a CPU, and compilation for every architecture."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
# Sums of at most 40 float32 products of order 1; location gradients multiply them by a level's size, at most 100.
FORWARD_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
# The output is rounded to the value's dtype once; gradients leave the kernels in float32.
DTYPES = {torch.float32: (0, 0.0), torch.float16: (1, 2.0**-11), torch.bfloat16: (2, 2.0**-8)}


@pytest.fixture(scope="module")
def device_code(tmp_path_factory, cases):
    """The kernels compiled for the CPU, with the headers that come with nvcc."""
    cases.need("nvcc", "GDINO_REQUIRE_NVCC")
    include = Path(shutil.which("nvcc")).resolve().parents[1] / "include"
    if not (include / "cuda_fp16.h").is_file():
        include = Path("/usr/local/cuda/include")
    target = tmp_path_factory.mktemp("device") / "device_code.so"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-w", f"-I{include}"]
    subprocess.run(["c++", *flags, str(HERE / "device_code_on_cpu.cpp"), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def run(library, value, shapes, locations, weights, grad, vector):
    batch, tokens, heads, width = value.shape
    _, queries, _, levels, points, _ = locations.shape
    sizes = (ctypes.c_int64 * 7)(batch, tokens, heads, width, queries, levels, points)
    flat = (ctypes.c_int * (2 * levels))(*[side for shape in shapes for side in shape])
    # Filled with NaN, which remains wherever the kernels fail to write.
    out = torch.full((batch, queries, heads * width), float("nan"), dtype=value.dtype)
    grad_value = torch.zeros(value.shape)
    grad_locations, grad_weights = torch.full_like(locations, float("nan")), torch.full_like(weights, float("nan"))
    pointers = [
        ctypes.c_void_p(x.data_ptr())
        for x in (grad, value, locations, weights, out, grad_value, grad_locations, grad_weights)
    ]
    library.msda_on_cpu(sizes, flat, DTYPES[value.dtype][0], int(vector), *pointers)
    return out, (grad_value, grad_locations, grad_weights)


def assert_matches(cases, library, case, vector):
    out, gradients = cases.expected(*case)
    found, ours = run(library, *case, vector)
    rounding = DTYPES[case[0].dtype][1]
    torch.testing.assert_close(found.double(), out, rtol=rounding, atol=FORWARD_TOLERANCE)
    for name, a, b in zip(("value", "locations", "weights"), ours, gradients, strict=True):
        torch.testing.assert_close(
            a.double(),
            b,
            rtol=GRADIENT_TOLERANCE,
            atol=GRADIENT_TOLERANCE,
            msg=lambda message, name=name: f"gradient of {name}: {message}",
        )


@pytest.mark.parametrize("seed", range(30))
def test_random_shapes_equal_float64(cases, device_code, seed):
    dtype = list(DTYPES)[seed % 3]
    case = cases.make_case(seed, dtype=dtype)
    vector = case[0].shape[3] % (16 // case[0].element_size()) == 0
    assert_matches(cases, device_code, case, vector)


@pytest.mark.parametrize(("width", "vector"), [(40, False), (160, True), (8, True), (1, False)])
def test_rows_wider_and_narrower_than_a_warp(cases, device_code, width, vector):
    assert_matches(cases, device_code, cases.make_case(100 + width, width=width), vector)


def test_more_rows_than_a_block(cases, device_code):
    assert_matches(cases, device_code, cases.make_case(7, width=8, queries=150), vector=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_non_finite_and_huge_locations_contribute_zero(cases, device_code, bad):
    value, shapes, locations, weights, grad = cases.make_case(3, width=16)
    elsewhere = locations.clone()
    elsewhere[:, ::2, :, :, 0, 0] = 50.0
    locations[:, ::2, :, :, 0, 0] = bad
    ours, theirs = (run(device_code, value, shapes, x, weights, grad, True) for x in (locations, elsewhere))
    for a, b in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
        assert torch.equal(a, b)


def test_infinite_values_reach_only_neighbouring_samples(cases, device_code):
    value = torch.ones(1, 9, 1, 16)
    value[:, 0], value[:, 8] = float("inf"), float("nan")
    places = [[0.4, 0.4], [0.6, 0.4], [0.9, 0.9], [9.0, 9.0], [-0.1, 0.5], [0.5, 1.1], [1.1, 0.4], [-0.1, -0.1]]
    locations = torch.tensor(places).view(1, -1, 1, 1, 1, 2)
    weights = torch.ones(locations.shape[:-1])
    out, _ = run(device_code, value, [(3, 3)], locations, weights, torch.ones(1, 8, 16), True)
    theirs = cases.reference(value.double(), [(3, 3)], locations.double(), weights.double())
    torch.testing.assert_close(out.double(), theirs, rtol=0, atol=FORWARD_TOLERANCE, equal_nan=True)


# The code has two variants: one for architectures from 9.0 on, and one for earlier ones.
@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", ["80", "90", *(pytest.param(x, marks=pytest.mark.soak) for x in ("86", "89", "100", "120"))]
)
def test_every_architecture_compiles_without_spills(cases, architecture, tmp_path):
    cases.need("nvcc", "GDINO_REQUIRE_NVCC")
    kernels = cases.load_script("compile_check").compile_for(architecture, tmp_path)
    # Three dtypes times two packet widths, each with one forward and two backward kernels.
    assert len(kernels) == 18
    assert {name: numbers["spills"] for name, numbers in kernels.items() if numbers["spills"]} == {}
    assert (tmp_path / f"sm_{architecture}.cubin").read_bytes()[:4] == b"\x7fELF"


GREEDY = """
__global__ void greedy(float* x) {
  float kept[64];
#pragma unroll
  for (int i = 0; i < 64; i++) kept[i] = x[i * blockDim.x + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; i++) x[i * blockDim.x + threadIdx.x] = kept[i] * kept[63 - i];
}
"""


def test_register_spills_are_detected(cases, tmp_path, monkeypatch):
    cases.need("nvcc", "GDINO_REQUIRE_NVCC")
    script = cases.load_script("compile_check")
    source = tmp_path / "greedy.cu"
    source.write_text(GREEDY)
    monkeypatch.setattr(script, "SOURCE", source)
    monkeypatch.setattr(script, "FLAGS", (*script.FLAGS, "-maxrregcount=24"))
    (numbers,) = script.compile_for("90", tmp_path).values()
    assert numbers["spills"] > 0


def test_random_cases_cover_all_levels_points_and_far_locations(cases):
    shapes = [cases.make_case(seed) for seed in range(30)]
    assert {len(case[1]) for case in shapes} == {1, 2, 3, 4, 5}
    assert {case[2].shape[4] for case in shapes} == set(range(1, 9))
    assert any((case[2].abs() > 50).any() for case in shapes)
