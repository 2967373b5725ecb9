"""Fixtures of the exported web page."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from made_once import made_once

REQUIRE_BROWSER = os.environ.get("GDINO_REQUIRE_BROWSER") == "1"


@pytest.fixture(scope="session")
def npm_packages():
    """The npm packages of the page. Where they cannot be had, tests are skipped, or fail if a browser is required."""
    from gdino_hf.export.npm_files import npm_files

    try:
        return npm_files()
    except ValueError as error:
        (pytest.fail if REQUIRE_BROWSER else pytest.skip)(str(error))


@pytest.fixture(scope="session")
def page_site(tmp_path_factory, nano_export, npm_packages) -> Path:
    """A folder to serve, with the page of gdino-nano in some/where."""
    from gdino_hf import NANO, GDinoProcessor
    from gdino_hf.export.web_page import write_web_page

    def make(site):
        write_web_page(
            nano_export / "model.onnx", GDinoProcessor.from_pretrained(NANO), site / "some" / "where", name="gdino-nano"
        )

    return made_once(tmp_path_factory, "site", make)
