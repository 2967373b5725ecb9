"""The tab "Caption": a sentence, and the boxes of each of its phrases."""

from __future__ import annotations

from typing import Any

import gradio as gr

from . import components, render
from .components import PageState
from .masks import OFF
from .outputs import Outputs
from .picture_field import address_field, picture_field
from .queries import read_caption
from .result_panel import ResultPanel
from .safety import LONGEST_TEXT, Picture, Refused


def build(state: PageState) -> None:
    """Create the tab's components, events and endpoints.

    Args:
        state: The state of the page.
    """
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            image = picture_field("gd-caption")
            caption = gr.Textbox(
                value="a cup of coffee with a spoon",
                label="Caption",
                info="A sentence about the picture. Each thing that it names gets its boxes.",
                max_length=LONGEST_TEXT,
                lines=1,
                max_lines=6,
                elem_id="gd-caption-text",
            )
            ground = gr.Button("Find the phrases", variant="primary", elem_id="gd-caption-start")
            with gr.Accordion("More: web address, model", open=False, elem_id="gd-caption-more"):
                address_field(image)
                reading = components.reading_field(state)
                model = components.model_field(state)
                masks = components.masks_fields(state)
        with gr.Column(scale=6, min_width=320):
            empty = "Choose a picture, describe it in a sentence, and see where each part of the sentence is."
            panel = ResultPanel(state, "gd-caption", empty, "Phrases")
    if state.caption_examples:
        gr.Examples(state.caption_examples, [image, caption], label="Examples")

    def on_ground(
        image: Picture | None, caption: str, reading: str, model: str, threshold: float, nms: float,
        text_threshold: float, key: str | None, masks: str = OFF,
    ) -> tuple[Any, ...]:  # fmt: skip
        outputs = _run(state, image, caption, reading, model, masks)
        assert image is not None
        return panel.show(outputs, image, key, threshold, nms, text_threshold)

    def ground_endpoint(
        image: Picture | None, caption: str, reading: str, model: str, threshold: float, nms: float,
        text_threshold: float, masks: str = OFF,
    ) -> dict[str, Any]:  # fmt: skip
        """Find the phrases of a sentence in one picture; returns what /detect does, and each phrase's characters."""
        outputs = _run(state, image, caption, reading, model, masks)
        chosen = components.read_settings(threshold, nms, text_threshold)
        return render.report(outputs, outputs.detections(chosen), chosen)

    query = [image, caption, reading, model, *panel.thresholds]
    gr.on(
        [ground.click, caption.submit],
        on_ground,
        [*query, panel.key, *masks],
        panel.outputs,
        api_visibility="private",
        show_progress_on=panel.status,
        **components.RUNS_A_MODEL,
    )
    components.endpoint(ground_endpoint, [*query, *masks], "ground")


def _run(state: PageState, image: Picture | None, caption: str, reading: str, model: str, masks: str) -> Outputs:
    """Run a model with the values of the fields."""
    if image is None:
        raise Refused("There is no picture; upload one, paste it, or load it from an address.")
    return state.models.run(model, image, read_caption(caption, reading), masks)
