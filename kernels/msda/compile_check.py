"""Compile the CUDA device code for every architecture and fail if a kernel spills registers; no GPU is needed.

python kernels/msda/compile_check.py [--archs 80,90] [--keep FOLDER]
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "cuda" / "ms_deform_attn.cu"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
FLAGS = ("-std=c++17", "-O3", "-Xptxas", "-v")
_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def compile_for(architecture: str, folder: Path) -> dict[str, dict[str, int]]:
    """Compile the device code to folder/sm_NN.cubin.

    Args:
        architecture: Compute capability without the point, such as "90".
        folder: Folder for the cubin.

    Returns:
        "registers" and "spills" (bytes) of each kernel, by its mangled name.

    Raises:
        RuntimeError: nvcc fails, warns, or reports no kernel.
    """
    target = folder / f"sm_{architecture}.cubin"
    command = ["nvcc", *FLAGS, "-cubin", f"-arch=sm_{architecture}", str(SOURCE), "-o", str(target)]
    run = subprocess.run(command, capture_output=True, text=True)
    report = run.stdout + run.stderr
    if run.returncode or re.search(r"\bwarning\b", report):
        raise RuntimeError(f"nvcc for sm_{architecture} reports:\n{report}")
    kernels: dict[str, dict[str, int]] = {}
    name = ""
    for line in report.splitlines():
        if entry := _ENTRY.search(line):
            name = entry.group(1)
            kernels[name] = {}
        elif name and (spills := _SPILLS.search(line)):
            kernels[name]["spills"] = int(spills.group(2)) + int(spills.group(3))
        elif name and (registers := _REGISTERS.search(line)):
            kernels[name]["registers"] = int(registers.group(1))
    if not kernels or any(len(numbers) != 2 for numbers in kernels.values()):
        raise RuntimeError(f"nvcc for sm_{architecture} did not report registers and spills:\n{report}")
    return kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", default=",".join(ARCHITECTURES), help="compute capabilities (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="keep the cubins in this folder")
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("nvcc is not on PATH: install the CUDA toolkit (no GPU is needed).", file=sys.stderr)
        return 2
    spilled = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for architecture in args.archs.split(","):
            kernels = compile_for(architecture, folder)
            registers = [numbers["registers"] for numbers in kernels.values()]
            print(f"sm_{architecture}: {len(kernels)} kernels, {min(registers)} to {max(registers)} registers")
            for name, numbers in kernels.items():
                if numbers["spills"]:
                    spilled += 1
                    print(f"sm_{architecture}: {name} spills {numbers['spills']} bytes", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
