"""The package's front door: public names work wherever they are first used."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("program", ["gdino", "script.py"])
def test_embedded_processor_loads_first_thing(program):
    code = "from gdino_hf import NANO, GDinoProcessor; print(type(GDinoProcessor.from_pretrained(NANO)).__name__)"
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = [{program!r}]; {code}"], capture_output=True, text=True
    )
    assert run.stdout.strip() == "GDinoProcessor", run.stderr
