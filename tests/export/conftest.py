"""Fixtures of exported models, made once for all test processes of a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

REQUIRE_BROWSER = os.environ.get("GDINO_REQUIRE_BROWSER") == "1"


def made_once(tmp_path_factory, name, make) -> Path:
    """Return a folder of this test run, which the first test process that asks for it makes."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not folder.is_dir():
            make(folder)
    return folder


@pytest.fixture(scope="session")
def nano_onnx(tmp_path_factory) -> Path:
    """gdino-nano as one ONNX file."""
    from gdino_hf.export import export

    return made_once(tmp_path_factory, "nano-onnx", lambda folder: export("nano", folder)) / "model.onnx"


@pytest.fixture(scope="session")
def npm_packages():
    """The npm packages of the page. Where they cannot be had, tests are skipped, or fail if a browser is required."""
    from gdino_hf.export.npm_files import npm_files

    try:
        return npm_files()
    except ValueError as error:
        (pytest.fail if REQUIRE_BROWSER else pytest.skip)(str(error))


@pytest.fixture(scope="session")
def page_site(tmp_path_factory, nano_onnx, npm_packages) -> Path:
    """A folder to serve, with the page of gdino-nano in some/where."""
    from gdino_hf import NANO, GDinoProcessor
    from gdino_hf.export.web_page import write_web_page

    def make(site):
        write_web_page(nano_onnx, GDinoProcessor.from_pretrained(NANO), site / "some" / "where", name="gdino-nano")

    return made_once(tmp_path_factory, "site", make)
