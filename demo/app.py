"""The Space: `python app.py` serves the page with the models that GDINO_DEMO_MODELS names, by default gdino-nano."""

from __future__ import annotations

import os

from gdino_demo import tools
from gdino_demo.page import Page  # on ZeroGPU, spaces must be imported before torch

from gdino_hf import Detector


def main() -> None:
    """Load the models and serve the page."""
    names = [name.strip() for name in os.environ.get("GDINO_DEMO_MODELS", "").split(",") if name.strip()]
    # The variable with which gradio switches its server for agents on.
    wanted = os.environ.get("GRADIO_MCP_SERVER", "").lower() == "true"
    if wanted and not tools.available():
        raise SystemExit(f"GRADIO_MCP_SERVER is true, but {tools.MISSING}")
    page = Page({name: Detector(name) for name in names or ["nano"]}, mcp=wanted)
    page.launch()
    page.close()


if __name__ == "__main__":
    main()
