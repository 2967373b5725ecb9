"""The notebooks of examples/ run from top to bottom on data of the repository's own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import gdino_hf

ROOT = Path(__file__).resolve().parents[2]
# Where the kernel finds the package that is tested, installed or not.
PACKAGE = str(Path(gdino_hf.__file__).resolve().parents[1])
NAMES = ("detect", "evaluate", "fine_tune")


@pytest.fixture
def examples(tmp_path):
    """A folder to run notebooks in, which read `../demo` from where it lies."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "examples").mkdir()
    return tmp_path / "examples"


def test_there_are_three():
    assert tuple(notebook.stem for notebook in sorted((ROOT / "examples").glob("*.ipynb"))) == NAMES


@pytest.mark.slow
def test_a_notebook_runs_in_a_kernel(examples):
    """In a process of its own: nbmake starts a kernel."""
    pytest.importorskip("nbmake")
    copy = examples / "detect.ipynb"
    copy.write_bytes((ROOT / "examples" / copy.name).read_bytes())
    (examples.parent / "pytest.ini").write_text("[pytest]\n")
    path = os.pathsep.join([PACKAGE, os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--nbmake", "--nbmake-timeout=300", str(copy)],
        cwd=examples.parent,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[1:])
def test_cells_of_the_others_run_one_after_the_other(name, examples, tmp_path, monkeypatch):
    """In this process, which has torch loaded already: their cells are plain Python, which needs no kernel."""
    monkeypatch.chdir(examples)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cells = json.loads((ROOT / "examples" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}.ipynb", "exec"), names)
    assert len(names) > 10
