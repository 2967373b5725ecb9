"""Fixtures: a running page with gdino-nano, one per worker, with a client and a browser for it."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import warnings
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# The page is imported from the Space's folder, as `python app.py` does.
sys.path.insert(0, str(REPOSITORY / "demo"))

if importlib.util.find_spec("gradio") is None:
    # Without the demo extra there is nothing to test.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def nano():
    """A second gdino-nano, as users load it, to compare with."""
    from gdino_hf import Detector

    return Detector("nano", optimize=False)


@pytest.fixture(scope="session")
def serve():
    """Function that serves a page with segmenters, at `page.address`, in a with block."""
    from gdino_demo.page import Page

    from gdino_hf import Detector

    @contextlib.contextmanager
    def serve(segmenters=None):
        with warnings.catch_warnings():
            # gradio only warns if the parameters of a function do not fit its fields.
            warnings.simplefilter("error", UserWarning)
            page = Page({"nano": Detector("nano")}, segmenters)
        page.address = page.launch(wait=False, quiet=True)
        yield page
        page.close()

    return serve


@pytest.fixture(scope="session")
def page(serve):
    """A running page, at `page.address`."""
    with serve() as page:
        yield page


@pytest.fixture(scope="session")
def client(page):
    """A gradio client connected to the page."""
    from gradio_client import Client

    return Client(page.address, verbose=False)
