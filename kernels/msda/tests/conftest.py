"""Fixtures of the kernel tests: a float64 reference, random inputs, and builds that are made once per session."""

import importlib.util
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from made_once import made_once

PROJECT = Path(__file__).resolve().parents[1]

# pytest names this module after its folders, and thereby hides the installed package `kernels` by an empty module.
if not hasattr(sys.modules.get("kernels"), "get_kernel"):
    sys.modules.pop("kernels", None)


def need(program, variable):
    """Skip the test without a compiler, or fail it if the environment requires one."""
    if shutil.which(program) is None:
        if os.environ.get(variable) == "1":
            pytest.fail(f"{variable}=1, but {program} is not on PATH")
        pytest.skip(f"{program} is not on PATH")


def reference(value, spatial_shapes, locations, weights):
    """Sample each level with grid_sample, then take the weighted sum over levels and points."""
    batch, _, heads, width = value.shape
    out = value.new_zeros(batch, heads, width, locations.shape[1])
    for level, tokens in enumerate(value.split([h * w for h, w in spatial_shapes], dim=1)):
        h, w = spatial_shapes[level]
        image = tokens.reshape(batch, h, w, heads, width).permute(0, 3, 4, 1, 2).flatten(0, 1)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        sampled = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        sampled = sampled.view(batch, heads, width, *grid.shape[1:3])
        out = out + (sampled * weights[:, :, :, level].transpose(1, 2)[:, :, None]).sum(-1)
    return out.permute(0, 3, 1, 2).flatten(2)


def make_case(seed, width=None, dtype=torch.float32, queries=None):
    """Random value, shapes, locations (some far outside), weights and gradient, with 1-5 levels and 1-8 points."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    shapes = [(choose.randint(1, 9), choose.randint(1, 11)) for _ in range(choose.randint(1, 5))]
    batch, heads, points = choose.randint(1, 2), choose.randint(1, 4), choose.randint(1, 8)
    queries = queries or choose.randint(1, 12)
    width = width or choose.choice((8, 9, 16, 20, 24, 31, 32, 48, 64))
    spread = choose.choice((0.9, 1.3, 6.0, 200.0))
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, width, generator=generator).to(dtype)
    size = batch, queries, heads, len(shapes), points
    cells = torch.tensor([[w, h] for h, w in shapes], dtype=torch.float32)[:, None]
    while True:
        locations = (torch.rand(*size, 2, generator=generator) - 0.5) * spread + 0.5
        pixels = locations.double() * cells - 0.5
        # The gradient is discontinuous at cell centres, where rounding decides the side, so keep away from them.
        if not ((pixels.abs() < 1e3) & ((pixels - pixels.round()).abs() < 1e-5)).any():
            break
    weights = torch.rand(size, generator=generator)
    grad = torch.randn(batch, queries, heads * width, generator=generator).to(dtype)
    return value, shapes, locations, weights / weights.sum((-2, -1), keepdim=True), grad


def expected(value, shapes, locations, weights, grad):
    """Compute the output and gradients in float64."""
    inputs = [tensor.double().requires_grad_() for tensor in (value, locations, weights)]
    out = reference(inputs[0], shapes, *inputs[1:])
    return out.detach(), torch.autograd.grad(out, inputs, grad.double())


def load_script(name):
    """Import a script of the project as a module."""
    spec = importlib.util.spec_from_file_location(f"msda_{name}", PROJECT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cases():
    """This module, since pytest's importlib mode does not let tests import it by name."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def variant(tmp_path_factory):
    """A function that builds a variant, once for all test processes, and loads it through the kernels package."""
    loaded = {}

    def make(backend, architectures=("90",)):
        kernels = pytest.importorskip("kernels")
        need("nvcc" if backend == "cuda" else "c++", "GDINO_REQUIRE_NVCC" if backend == "cuda" else "GDINO_REQUIRE_C")
        if backend not in loaded:
            build = load_script("build_local").build
            out = made_once(tmp_path_factory, f"msda-{backend}", lambda out: build(backend, list(architectures), out))
            (folder,) = out.iterdir()
            loaded[backend] = folder, kernels.get_local_kernel(folder)
        return loaded[backend]

    return make
