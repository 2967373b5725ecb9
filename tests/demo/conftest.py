"""One page of gdino-nano for all tests of a worker, and the browser that looks at it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
REQUIRE_BROWSER = os.environ.get("GDINO_REQUIRE_BROWSER") == "1"

# The page is the Space's folder: it is imported from where it lies, as `python app.py` does.
sys.path.insert(0, str(REPOSITORY / "demo"))

if importlib.util.find_spec("gradio") is None:
    # The page needs the demo extra; without it there is nothing to test.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def nano():
    """gdino-nano as everyone loads it, apart from the page's own."""
    from gdino_hf import NANO, GDinoForObjectDetection, GDinoProcessor

    return GDinoForObjectDetection.from_pretrained(NANO).eval(), GDinoProcessor.from_pretrained(NANO)


@pytest.fixture(scope="session")
def page(nano):
    """A running page; `page.address` is where."""
    import copy

    from gdino_demo.page import Page

    model, processor = nano
    with warnings.catch_warnings():
        # gradio only warns of a function that does not take what its fields give.
        warnings.simplefilter("error", UserWarning)
        page = Page({"nano": (copy.deepcopy(model), processor)})
    page.address = page.launch(wait=False, quiet=True)
    yield page
    page.close()


@pytest.fixture(scope="session")
def client(page):
    """A gradio client."""
    from gradio_client import Client

    return Client(page.address, verbose=False)


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium; a test that needs it is skipped where there is none, and fails where there must be one."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if program is None:
        message = "there is no Chromium, or no playwright to drive it"
        (pytest.fail if REQUIRE_BROWSER else pytest.skip)(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory):
    """Where screenshots go: GDINO_TEST_ARTIFACTS, or pytest's own folder."""
    folder = os.environ.get("GDINO_TEST_ARTIFACTS")
    if folder is None:
        return tmp_path_factory.mktemp("artifacts")
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)
