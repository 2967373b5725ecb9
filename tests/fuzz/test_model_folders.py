"""Whatever is wrong with a model folder, every way to load it ends in a result or in one sentence with the cause.

The short run takes one mutation of each kind; `pytest -m fuzz` takes 140.
"""

from __future__ import annotations

import re
import resource
import shutil
import signal
import time

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassError
from model_folder_mutations import KINDS, mutate
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection, pipeline

from gdino_hf import GDinoForObjectDetection
from gdino_hf.cli.errors import UsageError
from gdino_hf.cli.model_options import load_detector
from gdino_hf.conversion.conversion_error import ConversionError
from gdino_hf.conversion.engine import convert

# Of the processor's time: the clock also counts what other programs take on a busy machine.
MOST_SECONDS = 10.0
MOST_KILOBYTES = 1_000_000
PICTURE = Image.linear_gradient("L").convert("RGB")
LIBRARY = (OSError, ValueError, TypeError, ImportError, StrictDataclassError)


def detect(folder):
    """Load a model as `gdino detect`, `eval` and `train` do, and run it."""
    labels = ["cat", "red cup"]
    found = load_detector(str(folder), labels, device="cpu", optimize=False)(PICTURE, labels, threshold=0.0)
    assert np.isfinite(found.scores).all()
    assert np.isfinite(found.boxes).all()


# How to load -> (function, errors that are documented).
WAYS = {
    "detect": (detect, UsageError),
    "from_pretrained": (GDinoForObjectDetection.from_pretrained, LIBRARY),
    "auto class": (AutoModelForZeroShotObjectDetection.from_pretrained, LIBRARY),
    "pipeline": (
        lambda folder: pipeline("zero-shot-object-detection", model=str(folder))(PICTURE, candidate_labels=["cat"]),
        LIBRARY,
    ),
    "convert": (lambda folder: convert(folder, folder / "out.pth", to="original"), ConversionError),
}


class TooSlowError(BaseException):
    """Loading took longer than the limit."""


def too_slow(*_):
    raise TooSlowError


def has_a_cause(way, error):
    """Whether a message says what is wrong, and not only that something is."""
    text = str(error)
    if way == "detect":
        found = re.fullmatch(
            r"--model .+ cannot be loaded \((.+)\); give a Hub id, a folder with its files, or nano", text
        )
        text = found[1] if found else ""
    elif way == "pipeline":
        # transformers joins the tracebacks of all classes that it tried; the last line is ours.
        text = text.strip().splitlines()[-1]
    elif way == "auto class" and isinstance(error, StrictDataclassError):
        text = text.splitlines()[-1]
    one_line = "\n" not in text.strip()
    return one_line and len(text.split()) >= 4 and not text.rstrip().endswith(":") and "object at 0x" not in text


def tried(base, tmp_path, seed):
    """Mutate a copy of a folder, load it in every way, and return what went wrong."""
    wrong = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGPROF, too_slow)
    try:
        for way, (load, documented) in WAYS.items():
            folder = shutil.copytree(base, tmp_path / f"{seed} {way}")
            what = f"{mutate(folder, seed)} | {way}"
            start = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
            try:
                load(folder)
            except documented as error:
                if not has_a_cause(way, error):
                    wrong.append(f"{what}: no cause in {error!r}")
            except TooSlowError:
                wrong.append(f"{what}: took {time.process_time() - start:.0f} s")
            except Exception as error:
                wrong.append(f"{what}: undocumented {error!r}")
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            shutil.rmtree(folder)
    finally:
        signal.signal(signal.SIGPROF, previous)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown > MOST_KILOBYTES:
        wrong.append(f"{seed}: took {grown / 1e6:.1f} GB")
    return wrong


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """Run in an empty folder, to see whether a pickle ran a command there."""
    folder = tmp_path / "nowhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("seed", range(len(KINDS)), ids=lambda seed: f"{seed}-{KINDS[seed].__name__[1:]}")
def test_one_mutation_of_each_kind(seed, tiny_folder, tmp_path, nowhere):
    assert tried(tiny_folder, tmp_path, seed) == []
    assert list(nowhere.iterdir()) == []


@pytest.mark.fuzz
def test_many_mutations(tiny_folder, tmp_path, nowhere):
    wrong = [sentence for seed in range(140) for sentence in tried(tiny_folder, tmp_path, seed)]
    assert wrong == []
    assert list(nowhere.iterdir()) == []
