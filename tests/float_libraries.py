"""The float32 layers in C: the installed library, and one compiled here with other flags."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gdino_hf.inference.float_linear import FloatLibrary

SOURCE = Path(__file__).resolve().parents[1] / "kernels" / "float_linear" / "float_linear.c"
FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]

compiles = pytest.mark.skipif(
    shutil.which("cc") is None or sys.platform != "linux" or not SOURCE.is_file(),
    reason="needs a C compiler that builds ELF libraries, and the source",
)


def compile_library(folder, *flags):
    output = folder / "float.so"
    subprocess.run(["cc", *FLAGS, *flags, str(SOURCE), "-o", str(output), "-lm"], check=True)
    return FloatLibrary(output)
