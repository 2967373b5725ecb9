"""`gdino_hf.drop_in` is public, and importing it costs nothing; what it does is tested in tests/integrations."""

import gdino_hf


def test_drop_in_is_a_public_name():
    assert "drop_in" in gdino_hf.__all__
    assert callable(gdino_hf.drop_in)


def test_the_name_is_the_function_whatever_was_imported_first(fresh_python):
    code = """
import gdino_hf.integrations.replacement
import gdino_hf
undo = gdino_hf.drop_in()
from transformers import AutoProcessor
names = type(AutoProcessor.from_pretrained(gdino_hf.NANO)).__name__
undo()
print(names, type(AutoProcessor.from_pretrained(gdino_hf.NANO)).__name__)
"""
    done = fresh_python.run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["GroundingDinoProcessor", "GDinoProcessor"]
