"""The float32 layers in C for the tests of this folder."""

import pytest

from gdino_hf.inference import float_linear
from gdino_hf.inference.float_linear import FloatLibrary
from layer_libraries import WIDE, compile_library, compiles, installed_library


@pytest.fixture(scope="module")
def installed():
    """The library that the package was installed with."""
    return installed_library("_float_cpu", FloatLibrary, float_linear.load, "float32 layers", "AVX2")


@pytest.fixture(scope="module", params=["installed", pytest.param("wide", marks=compiles)])
def library(request, tmp_path_factory, installed):
    """The installed library, and the code for AVX-512 compiled for CPUs with AVX2."""
    if request.param == "installed":
        return installed
    wide = compile_library(tmp_path_factory, *WIDE)
    assert wide.supported() == 16
    return wide
