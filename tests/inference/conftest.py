"""The float32 layers in C for the tests of this folder."""

import os

import pytest

from float_libraries import compile_library, compiles
from gdino_hf.inference import float_linear
from gdino_hf.inference.float_linear import FloatLibrary
from gdino_hf.model.compiled_libraries import find_compiled


@pytest.fixture(scope="module")
def installed():
    """The library that the package was installed with."""
    path = find_compiled("_float_cpu")
    if path is None:
        reason = "the float32 layers are not built: install the package with a C compiler"
        if os.environ.get("GDINO_REQUIRE_C") == "1":
            pytest.fail(f"GDINO_REQUIRE_C=1, but {reason}")
        pytest.skip(reason)
    found = float_linear.load()
    if found is None:
        assert FloatLibrary(path).supported() == 0
        pytest.skip("this CPU has no AVX2")
    return found


@pytest.fixture(scope="module", params=["installed", pytest.param("wide", marks=compiles)])
def library(request, tmp_path_factory, installed):
    """The installed library, and the code for AVX-512 compiled for CPUs with AVX2."""
    if request.param == "installed":
        return installed
    wide = compile_library(tmp_path_factory.mktemp("wide"), "-DFLOAT_WIDE_ON_AVX2")
    assert wide.supported() == 16
    return wide
