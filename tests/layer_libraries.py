"""The layers in C: installed libraries, one compiled here with other flags, and what holds for each of them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gdino_hf.inference.float_linear import FloatLibrary
from gdino_hf.model.compiled_libraries import find_compiled
from made_once import made_once

SOURCE = Path(__file__).resolve().parents[1] / "kernels" / "float_linear" / "float_linear.c"
FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]

compiles = pytest.mark.skipif(
    shutil.which("cc") is None or sys.platform != "linux" or not SOURCE.is_file(),
    reason="needs a C compiler that builds ELF libraries, and the source",
)


# The code for AVX-512, for CPUs with AVX2.
WIDE = ("-fopenmp", "-DFLOAT_WIDE_ON_AVX2")


def compile_library(tmp_path_factory, *flags):
    """Return the library compiled with more flags, which the first test process that needs it does."""

    def make(folder):
        folder.mkdir()
        subprocess.run(["cc", *FLAGS, *flags, str(SOURCE), "-o", str(folder / "float.so"), "-lm"], check=True)

    return FloatLibrary(made_once(tmp_path_factory, "float" + "".join(flags), make) / "float.so")


def installed_library(file, kind, load, what, cpu):
    """Return an installed library; skip the test if it cannot run here, unless GDINO_REQUIRE_C forbids that."""
    path = find_compiled(file)
    if path is None:
        reason = f"the {what} are not built: install the package with a C compiler"
        if os.environ.get("GDINO_REQUIRE_C") == "1":
            pytest.fail(f"GDINO_REQUIRE_C=1, but {reason}")
        pytest.skip(reason)
    found = load()
    if found is None:
        assert not kind(path).supported()
        pytest.skip(f"this CPU has no {cpu}")
    return found


def assert_defaults_have_no_effect(library, weight_type, inputs, dtype):
    """C writes float32, so a smaller result tensor would overflow."""
    x, weight, bias = inputs
    wanted = library.linear(x, weight_type(library, weight, bias))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = library.linear(x, weight_type(library, weight, bias))
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


def norm(width):
    """A layer normalization with weights of its own."""
    generator = torch.Generator().manual_seed(width)
    made = nn.LayerNorm(width, eps=1e-5).requires_grad_(False)
    made.weight.uniform_(0.5, 1.5, generator=generator)
    made.bias.normal_(generator=generator)
    return made
