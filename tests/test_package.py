"""The package's front door: public names work wherever they are first used."""

import subprocess
import sys
from pathlib import Path

import pytest

import gdino_hf


@pytest.mark.parametrize("program", ["gdino", "script.py"])
def test_the_embedded_processor_loads_first_thing(program):
    """Inside the command, too, where registration with the auto classes waits for the first class used."""
    code = "from gdino_hf import NANO, GDinoProcessor; print(type(GDinoProcessor.from_pretrained(NANO)).__name__)"
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = [{program!r}]; {code}"], capture_output=True, text=True
    )
    assert run.stdout.strip() == "GDinoProcessor", run.stderr


def test_no_file_name_stands_in_two_folders():
    files = [file for file in Path(gdino_hf.__file__).parent.rglob("*.py") if file.name != "__init__.py"]
    folders = {}
    for file in files:
        folders.setdefault(file.name, []).append(file.parent.name)
    assert {name: places for name, places in folders.items() if len(places) > 1} == {}
