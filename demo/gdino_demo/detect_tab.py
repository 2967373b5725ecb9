"""The tab "Detect": what labels name, as boxes in one picture."""

from __future__ import annotations

from typing import Any

import gradio as gr

from gdino_hf.detection.vocabulary_text import vocabulary_text

from . import components, render
from .components import PageState
from .fetch import fetch
from .masks import OFF
from .outputs import Outputs
from .picture_field import address_field, picture_field
from .queries import read_query, read_vocabulary_file
from .request_limits import CheckedFiles
from .result_panel import ResultPanel
from .safety import Picture, Refused, read_picture

_LABELS = "Labels"


def build(state: PageState) -> None:
    """Create the tab's components, events and endpoints.

    Args:
        state: The state of the page.
    """
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            image = picture_field("gd")
            labels = components.labels_field(label=_LABELS)
            labels.elem_id = "gd-labels"
            detect = gr.Button("Detect", variant="primary", elem_id="gd-detect")
            with gr.Accordion("More: web address, vocabulary file, tiles, model", open=False, elem_id="gd-more"):
                address = address_field(image)
                negatives = components.negatives_field()
                file = CheckedFiles(
                    label="Vocabulary file: text, JSON or saved .safetensors",
                    file_count="single",
                    file_types=[".txt", ".json", ".safetensors"],
                    height=120,
                    elem_id="gd-vocabulary",
                )
                tiles = components.tiles_field()
                tiles.elem_id = "gd-tiles"
                model = components.model_field(state)
                masks = components.masks_fields(state)
        with gr.Column(scale=6, min_width=320):
            empty = "Choose a picture, name what to look for, and press Detect."
            panel = ResultPanel(state, "gd", empty, "Labels")
    if state.examples:
        gr.Examples(state.examples, [image, labels], label="Examples")

    def on_detect(
        image: Picture | None, labels: str, negatives: str, model: str, threshold: float, nms: float,
        text_threshold: float, tiles: float, vocabulary: list[tuple[str, str]] | None, key: str | None,
        masks: str = OFF,
    ) -> tuple[Any, ...]:  # fmt: skip
        outputs = _run(state, image, labels, negatives, model, tiles, vocabulary, masks)
        assert image is not None
        return panel.show(outputs, image, key, threshold, nms, text_threshold)

    def detect_endpoint(
        image: Picture | None, labels: str, negatives: str, model: str, threshold: float, nms: float,
        text_threshold: float, tiles: float, vocabulary: list[tuple[str, str]] | None = None, masks: str = OFF,
    ) -> dict[str, Any]:  # fmt: skip
        """Detect the labels in one picture; returns labels, scores, xyxy boxes in pixels, and each label's presence."""
        outputs = _run(state, image, labels, negatives, model, tiles, vocabulary, masks)
        chosen = components.read_settings(threshold, nms, text_threshold)
        return render.report(outputs, outputs.detections(chosen), chosen)

    def detect_url_endpoint(
        address: str, labels: str, negatives: str, model: str, threshold: float, nms: float, text_threshold: float,
        tiles: float, vocabulary: list[tuple[str, str]] | None = None, masks: str = OFF,
    ) -> dict[str, Any]:  # fmt: skip
        """Detect the labels in a picture at a public http(s) address; returns what /detect does."""
        picture = read_picture(fetch(address), address)
        return detect_endpoint(
            picture, labels, negatives, model, threshold, nms, text_threshold, tiles, vocabulary, masks
        )

    query = [labels, negatives, model, *panel.thresholds, tiles, file]
    gr.on(
        [detect.click, labels.submit, negatives.submit],
        on_detect,
        [image, *query, panel.key, *masks],
        panel.outputs,
        api_visibility="private",
        show_progress_on=panel.status,
        **components.RUNS_A_MODEL,
    )
    file.change(_show_file, [file, labels], labels, api_visibility="private", **components.FILTERS)
    components.endpoint(detect_endpoint, [image, *query, *masks], "detect")
    components.endpoint(detect_url_endpoint, [address, *query, *masks], "detect_url")


def _run(
    state: PageState,
    image: Picture | None,
    labels: str,
    negatives: str,
    model: str,
    tiles: float,
    vocabulary: list[tuple[str, str]] | None,
    masks: str,
) -> Outputs:
    """Run a model with the values of the fields."""
    if image is None:
        raise Refused("There is no picture; upload one, paste it, or load it from an address.")
    file = vocabulary[0] if vocabulary else None
    return state.models.run(model, image, read_query(labels, negatives, file, tiles), masks)


def _show_file(vocabulary: list[tuple[str, str]] | None, labels: str) -> Any:
    """Show the labels of a vocabulary file in the field for labels, which cannot be edited as long as there is one."""
    if not vocabulary:
        return gr.Textbox(value=labels, label=_LABELS, interactive=True)
    path, name = vocabulary[0]
    text = vocabulary_text(read_vocabulary_file(path, name))
    return gr.Textbox(value=text, label=f"{_LABELS} of {name}", interactive=False)
