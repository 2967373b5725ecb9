"""`gdino detect` run in the test's own process, and a picture for it."""

import contextlib
import io
import json

import numpy as np
from PIL import Image

from gdino_hf.cli import main

# The random model scores near zero; with these every query is a result.
EVERYTHING = ["--threshold", "0", "--text-threshold", "0"]
LABELS = ["cat", "remote control", "dog"]


def run_detect(model, out, *arguments, labels=None, json_path=None):
    """Run the verb: its status, the JSON if written, what it printed and complained."""
    options = ["--labels", ", ".join(LABELS) if labels is None else labels, "--model", str(model), "--out", str(out)]
    options += ["--json", str(json_path)] if json_path is not None else []
    printed, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
        status = main(["detect", *map(str, arguments), *options])
    path = json_path or out / "detections.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return status, report, printed.getvalue(), complained.getvalue()


def make_picture():
    """A photograph's worth of smooth random colours, 120 wide and 80 high."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((120, 80), Image.Resampling.BICUBIC)
