"""A virtual environment without torch and transformers finds in the README's photographs what the package finds."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

import gdino_hf

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "demo" / "examples"
LABELS = ["cat", "person", "cup"]
OPTIONS = {"threshold": 0.2, "nms_threshold": 0.5}
# Two libraries compute float32 products in other orders.
PIXELS, SCORES = 0.1, 1e-3

SCRIPT = """
import importlib.util, json, sys
for name in ("torch", "transformers", "scipy", "safetensors"):
    assert importlib.util.find_spec(name) is None, name
from gdino_hf.runtime import Detector, Vocabulary
for what in (Vocabulary(["cat"]).save, Vocabulary.load):
    try:
        what("features.safetensors")
    except ImportError as error:
        assert str(error).startswith(f'{what.__qualname__} needs torch; pip install "gdino-hf[torch]"'), error
    else:
        raise AssertionError(what)
folder, labels, options, pictures = json.loads(sys.argv[1])
found = Detector(folder)(pictures, labels, **options)
print(json.dumps([[x.boxes.tolist(), x.scores.tolist(), x.text_labels] for x in found]))
"""


@pytest.mark.environments
def test_an_environment_without_torch_finds_the_same(tmp_path, nano_export):
    source = tmp_path / "source"
    source.mkdir()
    left_out = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "build")
    for name in ("src", "kernels", "demo"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=left_out)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE", "constraints.txt"):
        shutil.copy(REPOSITORY / name, source)
    # The pip of this environment installs into the new one, which saves the time to install another.
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    # No compiler: the runtime has no use for the C kernels, and building them takes longest.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"CC": "/bin/false"}
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    command = [*pip, "install", "-q", "--no-compile", "-c", "constraints.txt", ".[runtime]"]
    installed = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert installed.returncode == 0, installed.stderr

    pictures = sorted(EXAMPLES.glob("*.jpg"))
    assert len(pictures) == 3
    request = json.dumps([str(nano_export), LABELS, OPTIONS, [str(path) for path in pictures]])
    run = subprocess.run(
        [python, "-c", SCRIPT, request], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    detector = gdino_hf.Detector("nano", device="cpu")
    for path, (boxes, scores, texts) in zip(pictures, json.loads(run.stdout), strict=True):
        expected = detector(path, LABELS, **OPTIONS)
        assert path.stem in texts
        assert texts == expected.text_labels
        np.testing.assert_allclose(boxes, expected.boxes, atol=PIXELS)
        np.testing.assert_allclose(scores, expected.scores, atol=SCORES)

    command = [tmp_path / "venv" / "bin" / "gdino", "detect", str(pictures[0]), "--labels", "cat"]
    refused = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert 'needs torch; pip install "gdino-hf[torch]"' in refused.stderr
