"""Build one variant of the kernel for this machine, for tests and benchmarks.

    python kernels/msda/build_local.py [--backend cuda|cpu] [--archs 80,90] [--out FOLDER]

It writes FOLDER/<variant>/{__init__.py, _ops.py, metadata.json, ...abi3.so} and prints that path. No GPU is needed.
Variants for publication are built by kernel-builder.
"""

import argparse
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
NAME, VERSION, LICENSE = "msda", 1, "Apache-2.0"
STABLE_ABI = (2, 10)
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
C_FLAGS = ["-O3", "-fPIC", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-fopenmp"]

# Contents of the header that kernel-builder provides: macros that expand their names, and an importable module.
REGISTRATION = """
#pragma once
#include <Python.h>
#define STABLE_TORCH_LIBRARY_EXPAND(NAME, MODULE) STABLE_TORCH_LIBRARY(NAME, MODULE)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(NAME, KEY, MODULE) STABLE_TORCH_LIBRARY_IMPL(NAME, KEY, MODULE)
#define MSDA_JOIN_(A, B) A##B
#define MSDA_JOIN(A, B) MSDA_JOIN_(A, B)
#define MSDA_TEXT_(A) #A
#define MSDA_TEXT(A) MSDA_TEXT_(A)
#define REGISTER_EXTENSION(NAME)                                                                      \\
  PyMODINIT_FUNC MSDA_JOIN(PyInit_, NAME)() {                                                         \\
    static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, MSDA_TEXT(NAME), nullptr, 0, nullptr}; \\
    return PyModule_Create(&module);                                                                  \\
  }
"""

OPS = '''"""The compiled operators."""

import torch

from . import {extension}

ops = torch.ops.{extension}


def add_op_namespace_prefix(name: str) -> str:
    """Qualified name of an operator: several builds may be loaded side by side."""
    return f"{extension}::{{name}}"
'''


def sources() -> list[Path]:
    """List the source files that a build depends on."""
    folders = ("cpu", "cuda", "torch-ext")
    return sorted(
        path
        for folder in folders
        for path in (HERE / folder).rglob("*")
        if path.suffix in (".c", ".cpp", ".cu", ".cuh", ".h", ".py")
    )


def cuda_version() -> str:
    """Return the version of nvcc, such as "13.0"."""
    text = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    if found is None:
        raise RuntimeError(f"nvcc does not report its version: {text}")
    return found.group(1)


def variant_name(backend: str) -> str:
    """Return the folder name by which the kernels package finds the variant for this machine."""
    compute = "cpu" if backend == "cpu" else "cu" + cuda_version().replace(".", "")
    return f"torch-stable-abi{STABLE_ABI[0]}{STABLE_ABI[1]}-{compute}-{platform.machine()}-{platform.system().lower()}"


def compile_library(backend: str, architectures: list[str], extension: str, target: Path) -> None:
    """Compile the extension module and link it into the file `target`."""
    definitions = [
        f"-DTORCH_EXTENSION_NAME={extension}",
        f"-DTORCH_TARGET_VERSION=0x{STABLE_ABI[0]:02x}{STABLE_ABI[1]:02x}000000000000ULL",
        "-DPy_LIMITED_API=0x030a0000",
        f"-D{backend.upper()}_KERNEL",
    ]
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "registration.h").write_text(REGISTRATION)
        includes = [f"-I{torch_folder / 'include'}", f"-I{sysconfig.get_path('include')}", f"-I{folder}"]
        cxx = ["c++", "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", *definitions, *includes]
        commands = {"torch-ext/torch_binding.cpp": cxx}
        if backend == "cpu":
            commands["cpu/torch_cpu.cpp"] = cxx
            commands["cpu/ms_deform_attn.c"] = ["cc", *C_FLAGS]
            link = ["c++", "-fopenmp"]
        else:
            code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
            nvcc = ["nvcc", "-std=c++17", "-O3", "-Xcompiler", "-fPIC", *code, *definitions, *includes]
            commands["cuda/torch_cuda.cu"] = nvcc
            commands["cuda/ms_deform_attn.cu"] = nvcc
            # The CUDA runtime is linked statically, so that the library loads where none is installed.
            link = ["nvcc", "-cudart", "static", *code]
        objects = [folder / f"{i}.o" for i in range(len(commands))]
        jobs = [
            [*command, "-c", str(HERE / source), "-o", str(to)]
            for (source, command), to in zip(commands.items(), objects, strict=True)
        ]
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, jobs))
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        _run([*link, "-shared", *map(str, objects), *libraries, "-o", str(target)])


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}\nfailed:\n{run.stdout}{run.stderr}")


def build(backend: str, architectures: list[str], out: Path) -> Path:
    """Build a variant.

    Args:
        backend: "cuda" or "cpu".
        architectures: Compute capabilities without the point, such as "90"; used for "cuda" only.
        out: Parent folder of the variant; an existing variant of the same name is replaced.

    Returns:
        The variant's folder.

    Raises:
        RuntimeError: A compiler fails.
    """
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources())).hexdigest()[:12]
    extension = f"_{NAME}_{backend}_{digest}"
    variant = out / variant_name(backend)
    shutil.rmtree(variant, ignore_errors=True)
    shutil.copytree(HERE / "torch-ext" / NAME, variant, ignore=shutil.ignore_patterns("__pycache__"))
    compile_library(backend, architectures, extension, variant / f"{extension}.abi3.so")
    (variant / "_ops.py").write_text(OPS.format(extension=extension))
    metadata = {
        "id": extension,
        "name": NAME,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
    }
    if backend == "cuda":
        metadata["backend"]["archs"] = [f"{a[:-1]}.{a[-1]}" for a in architectures]
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backend", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--archs", default=",".join(ARCHITECTURES), help="compute capabilities (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=HERE / "build", help="parent folder of the variant (default: %(default)s)"
    )
    args = parser.parse_args()
    compiler = "nvcc" if args.backend == "cuda" else "cc"
    if shutil.which(compiler) is None:
        print(f"{compiler} is not on PATH: install it to build the {args.backend} variant.", file=sys.stderr)
        return 2
    print(build(args.backend, args.archs.split(","), args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
