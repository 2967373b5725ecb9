"""Fixtures for bulk labelling: a folder with a random model whose boxes depend on the picture, and the command."""

import functools
import multiprocessing

import pytest

from label_command import run_label
from random_models import make_random_model


@pytest.fixture(autouse=True)
def _same_arithmetic(monkeypatch):
    """Let `Detector` choose the arithmetic as labelling does, so that results can be compared bit by bit."""
    monkeypatch.setenv("GDINO_ARITHMETIC", "fixed")


@pytest.fixture(scope="session")
def label_model(tmp_path_factory, tiny_config, tiny_processor):
    """The folder of a tiny random model whose scores and boxes depend on picture and text."""
    folder = tmp_path_factory.mktemp("label-model")
    make_random_model(tiny_config, perturb=lambda name: True).save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture
def label(tmp_path, label_model):
    """`run_label` with that model and a folder of its own."""
    return functools.partial(run_label, label_model, tmp_path / "out")


@pytest.fixture(scope="session")
def context():
    """Processes that begin with the package imported, so that a run begins in a moment."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["gdino_hf.labeling.label_run", "gdino_hf.model.modeling_gdino"])
    return made
