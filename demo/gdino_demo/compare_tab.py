"""The tab "Compare": two models, or two lists of labels, side by side on one picture."""

from __future__ import annotations

from typing import Any

import gradio as gr

from . import components, render
from .components import PageState
from .outputs import Outputs
from .queries import read_query
from .request_limits import CheckedImage, CheckedSlider
from .safety import Picture, Refused


# long: one tab, whose event functions use its components
def build(state: PageState) -> None:
    """Create the tab's components, events and endpoints.

    Args:
        state: The state of the page.
    """
    keys = [gr.State(None), gr.State(None)]
    image = CheckedImage(
        label="Picture",
        sources=["upload", "webcam", "clipboard"],
        type="filepath",
        height=240,
        buttons=[],
        elem_id="gd-compare-picture",
        alt_text="The picture to search",
    )
    models, labels, outputs = [], [], []
    start = gr.Button("Compare", variant="primary", elem_id="gd-compare", render=False)
    threshold = CheckedSlider(
        0, 1, value=state.threshold, step=0.01, label="Score threshold", render=False, elem_id="gd-compare-threshold"
    )
    nms = CheckedSlider(0, 1, value=state.nms, step=0.01, label="Overlap limit (NMS)", render=False)
    with gr.Row():
        for index, (side, prompt) in enumerate((("left", "cat, person, cup"), ("right", "animal, face, drink"))):
            with gr.Column(min_width=320):
                models.append(components.model_field(state, f"Model, {side}", index))
                labels.append(components.labels_field(prompt, f"Labels, {side}"))
    start.render()
    with gr.Row():
        threshold.render()
        nms.render()
    with gr.Row():
        for side in ("left", "right"):
            with gr.Column(min_width=320):
                status = components.html_field(f"gd-{side}-status")
                figure = components.figure_field(f"gd-{side}", f"Boxes, {side}")
                presence = components.html_field(f"gd-{side}-presence")
                with gr.Accordion("Every box", open=False):
                    table = components.html_field(f"gd-{side}-table")
                outputs.append((status, figure, presence, table))

    def on_start(
        image: Picture | None, left_model: str, left_labels: str, right_model: str, right_labels: str, threshold: float,
        nms: float, left_key: str | None, right_key: str | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        both = _run(state, image, (left_model, left_labels), (right_model, right_labels))
        assert image is not None
        settings = components.read_settings(threshold, nms)
        photograph = render.photograph(image.image, f"The picture {image.name}")
        shown: list[Any] = []
        for one in both:
            text, boxes, *tables = render.result(one, settings)
            shown += [text, gr.HTML(value=boxes, **photograph), *tables]
        kept = [state.kept.put(one, replaces=key) for one, key in zip(both, (left_key, right_key), strict=True)]
        return (*kept, *shown)

    def on_change(left_key: str | None, right_key: str | None, threshold: float, nms: float) -> tuple[Any, ...]:
        settings = components.read_settings(threshold, nms)
        shown: list[Any] = []
        for key in (left_key, right_key):
            one = state.kept.get(key)
            gone = (components.GONE if key else gr.skip(), gr.skip(), gr.skip(), gr.skip())
            shown += gone if one is None else render.result(one, settings)
        return tuple(shown)

    def compare_endpoint(
        image: Picture | None, left_model: str, left_labels: str, right_model: str, right_labels: str, threshold: float,
        nms: float,
    ) -> dict[str, Any]:  # fmt: skip
        """Run two models or two lists of labels on one picture; returns "left" and "right", each as /detect does."""
        both = _run(state, image, (left_model, left_labels), (right_model, right_labels))
        settings = components.read_settings(threshold, nms)
        left, right = (render.report(one, one.detections(settings), settings) for one in both)
        return {"left": left, "right": right}

    query = [image, models[0], labels[0], models[1], labels[1], threshold, nms]
    every = [component for side in outputs for component in side]
    start.click(
        on_start,
        [*query, *keys],
        [*keys, *every],
        api_visibility="private",
        show_progress_on=[outputs[0][0], outputs[1][0]],
        **components.RUNS_A_MODEL,
    )
    gr.on(
        [threshold.change, nms.change],
        on_change,
        [*keys, threshold, nms],
        every,
        api_visibility="private",
        **components.FILTERS,
    )
    components.endpoint(compare_endpoint, query, "compare")


def _run(state: PageState, image: Picture | None, *sides: tuple[str, str]) -> list[Outputs]:
    """Run every (model, labels) pair on the picture."""
    if image is None:
        raise Refused("There is no picture; upload one or paste it.")
    # All labels are parsed and checked before the first model runs.
    queries = [(model, read_query(labels)) for model, labels in sides]
    for model, query in queries:
        state.models.check(model, query)
    return [state.models.run(model, image, query) for model, query in queries]
