"""Fixtures: a running page with gdino-nano, one per worker, with a client and a browser for it."""

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
def page():
    """A running page, at `page.address`."""
    from gdino_demo.page import Page

    from gdino_hf import Detector

    with warnings.catch_warnings():
        # gradio only warns if the parameters of a function do not fit its fields.
        warnings.simplefilter("error", UserWarning)
        page = Page({"nano": Detector("nano")})
    page.address = page.launch(wait=False, quiet=True)
    yield page
    page.close()


@pytest.fixture(scope="session")
def client(page):
    """A gradio client connected to the page."""
    from gradio_client import Client

    return Client(page.address, verbose=False)


@pytest.fixture(scope="session")
def browser():
    """The installed Chromium. Without one, tests are skipped, or fail if GDINO_REQUIRE_BROWSER is 1."""
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
    """Folder for screenshots: GDINO_TEST_ARTIFACTS, or a temporary one."""
    folder = os.environ.get("GDINO_TEST_ARTIFACTS")
    if folder is None:
        return tmp_path_factory.mktemp("artifacts")
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)
