"""Building the package with and without a C compiler."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def copy_source(tmp_path):
    source = tmp_path / "source"
    # The files that the build needs, without compiled files of a working copy.
    leave_out = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=leave_out)
    for folder in ("kernels/msda/cpu", "kernels/int8_linear", "kernels/float_linear", "demo"):
        shutil.copytree(ROOT / folder, source / folder, ignore=leave_out)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    return source


def test_a_source_archive_holds_all_c_sources(tmp_path):
    """The libraries are optional, so a missing header would silently give a slow installation."""
    source = copy_source(tmp_path)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    needed = {str(file.relative_to(source)) for file in (source / "kernels").rglob("*.[ch]")}
    assert len(needed) == 14
    assert needed <= packed


@pytest.mark.environments
def test_without_a_compiler_it_installs_and_reports_its_backend(tmp_path):
    source = copy_source(tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run(command, cwd=source, env={**os.environ, "CC": "/bin/false"}, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    environment.pop("GDINO_REQUIRE_C", None)
    command = [sys.executable, "-m", "gdino_hf", "bench", "--repeats", "1", "--size", "64", "64", "--device", "cpu"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert "deformable attention in torch" in run.stdout
    assert run.stderr.count("PyTorch's own operations") == 1
    command += ["--dtype", "int8"]
    refused = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "reinstall gdino-hf on a machine with a C compiler" in refused.stderr
