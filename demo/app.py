"""The Space: `python app.py` serves the page with the models that GDINO_DEMO_MODELS names, by default gdino-nano.

GDINO_DEMO_MASKS names the segmenters of its menu of masks.
"""

from __future__ import annotations

import os

from gdino_demo import tools
from gdino_demo.page import Page  # on ZeroGPU, spaces must be imported before torch

from gdino_hf import Detector
from gdino_hf.segmentation import Segmenter


def main() -> None:
    """Load the models and serve the page."""
    # The variable with which gradio switches its server for agents on.
    wanted = os.environ.get("GRADIO_MCP_SERVER", "").lower() == "true"
    if wanted and not tools.available():
        raise SystemExit(f"GRADIO_MCP_SERVER is true, but {tools.MISSING}")
    detectors = {name: Detector(name) for name in _named("GDINO_DEMO_MODELS") or ["nano"]}
    segmenters = {name: Segmenter(name) for name in _named("GDINO_DEMO_MASKS")}
    page = Page(detectors, segmenters, mcp=wanted)
    page.launch()
    page.close()


def _named(variable: str) -> list[str]:
    """Return the names in an environment variable, which commas separate."""
    return [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]


if __name__ == "__main__":
    main()
