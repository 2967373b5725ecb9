"""The notebooks of examples/ run from top to bottom on data of the repository's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gdino_hf

ROOT = Path(__file__).resolve().parents[2]
# Where the kernel finds the package that is tested, installed or not.
PACKAGE = str(Path(gdino_hf.__file__).resolve().parents[1])
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def test_there_are_three():
    assert [notebook.stem for notebook in NOTEBOOKS] == ["detect", "evaluate", "fine_tune"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebook_runs(notebook, tmp_path):
    """In a process of its own: nbmake starts a kernel, and the notebook reads `../demo` from where it lies."""
    pytest.importorskip("nbmake")
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "examples").mkdir()
    copy = tmp_path / "examples" / notebook.name
    copy.write_bytes(notebook.read_bytes())
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    path = os.pathsep.join([PACKAGE, os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--nbmake", "--nbmake-timeout=300", str(copy)],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
