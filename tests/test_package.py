"""The package's front door: public names work wherever they are first used."""

import pytest


@pytest.mark.parametrize("program", ["gdino", "script.py"])
def test_embedded_processor_loads_first_thing(program, fresh_python):
    code = "from gdino_hf import NANO, GDinoProcessor; print(type(GDinoProcessor.from_pretrained(NANO)).__name__)"
    run = fresh_python.run(f"import sys; sys.argv = [{program!r}]; {code}")
    assert run.stdout.strip() == "GDinoProcessor", run.stderr
