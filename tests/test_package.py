"""The package's front door: public names work wherever they are first used."""

import subprocess
import sys
import textwrap

import pytest

from gdino_hf.cli import VERBS

# The shortest command line of each verb that its parser takes.
ARGUMENTS = {
    "detect": ["cat.jpg", "--labels", "cat"],
    "label": ["photos", "--labels", "cat", "--out", "labels"],
    "track": ["clip.mp4", "--labels", "cat"],
    "convert": ["one.pth", "other"],
    "export": ["nano", "--out", "folder"],
}


@pytest.mark.parametrize("program", ["gdino", "script.py"])
def test_embedded_processor_loads_first_thing(program, fresh_python):
    code = "from gdino_hf import NANO, GDinoProcessor; print(type(GDinoProcessor.from_pretrained(NANO)).__name__)"
    run = fresh_python.run(f"import sys; sys.argv = [{program!r}]; {code}")
    assert run.stdout.strip() == "GDinoProcessor", run.stderr


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_torch_the_package_is_imported_and_names_the_extra(missing):
    """In a process of its own: the one that the other tests fork has imported torch."""
    code = f"""
        import importlib.util, sys
        from importlib.machinery import PathFinder

        class Visible(PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                return None if name.partition(".")[0] == {missing!r} else super().find_spec(name, path, target)

        sys.meta_path = [Visible if finder is PathFinder else finder for finder in sys.meta_path]
        import gdino_hf
        assert gdino_hf.NANO and gdino_hf.__version__
        for name in ("Detector", "GDinoForObjectDetection"):
            try:
                getattr(gdino_hf, name)
            except ImportError as error:
                print(error)
        from gdino_hf.cli import VERBS, main
        for verb in VERBS:
            print(verb, main([verb, *{ARGUMENTS!r}.get(verb, ())]), file=sys.stderr)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    sentence = f'needs {missing}; pip install "gdino-hf[torch]" (exported models run without it, see gdino_hf.runtime).'
    names = ("Detector", "GDinoForObjectDetection")
    assert run.stdout.splitlines() == [f"gdino_hf.{name} {sentence}" for name in names]
    lines = [line for verb in VERBS for line in (f"gdino {verb}: error: gdino {verb} {sentence}", f"{verb} 2")]
    assert run.stderr.splitlines() == lines
