"""The Space: `python app.py` serves the page with the models that GDINO_DEMO_MODELS names, by default gdino-nano."""

from __future__ import annotations

import os

from gdino_demo.page import Page  # on ZeroGPU, spaces must be imported before torch

from gdino_hf import NANO, GDinoForObjectDetection, GDinoProcessor


def main() -> None:
    """Load the models and serve the page."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [name.strip() for name in os.environ.get("GDINO_DEMO_MODELS", "").split(",") if name.strip()]
    loaded = {}
    for name in names or ["nano"]:
        where = NANO if name == "nano" else name
        loaded[name] = (
            GDinoForObjectDetection.from_pretrained(where).to(device),
            GDinoProcessor.from_pretrained(where),
        )
    page = Page(loaded)
    page.launch()
    page.close()


if __name__ == "__main__":
    main()
