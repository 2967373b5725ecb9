"""The tab "Detect": boxes in one picture; sliders and switches filter stored outputs without running the model."""

from __future__ import annotations

import io
from typing import Any

import gradio as gr

from gdino_hf.model.picture_formats import END_BYTES, picture_format

from . import components, render
from .components import EVERY, GROUND, PageState
from .engine import Detection, Outputs, Settings
from .fetch import fetch
from .request_limits import CheckedImage, CheckedSlider
from .safety import Picture, Refused, read_picture

_EMPTY = '<div class="gd-status"><p>Choose a picture, name what to look for, and press Detect.</p></div>'
# Formats that browsers show.
_EXTENSIONS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "AVIF": ".avif"}


# long: one tab, whose event functions use its components
def build(state: PageState) -> None:
    """Create the tab's components, events and endpoints.

    Args:
        state: The state of the page.
    """
    key = gr.State(None)
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            image = CheckedImage(
                label="Picture",
                sources=["upload", "webcam", "clipboard"],
                type="filepath",
                height=300,
                buttons=[],
                elem_id="gd-picture",
                alt_text="The picture to search",
            )
            with gr.Row(elem_classes="gd-address"):
                address = gr.Textbox(
                    label="or a web address",
                    placeholder="https://example.org/cat.jpg",
                    max_length=2000,
                    max_lines=1,
                    scale=4,
                    min_width=180,
                    elem_id="gd-address",
                )
                load = gr.Button("Load", scale=1, min_width=70, elem_id="gd-load")
            labels = components.labels_field()
            labels.elem_id = "gd-labels"
            detect = gr.Button("Detect", variant="primary", elem_id="gd-detect")
            with gr.Accordion("Mode, negative labels, model", open=False, elem_id="gd-more"):
                mode = gr.Radio([EVERY, GROUND], value=EVERY, label="Mode", elem_id="gd-mode")
                negatives = components.negatives_field()
                model = components.model_field(state)
        with gr.Column(scale=6, min_width=320):
            status = components.html_field("gd-status", _EMPTY)
            figure = components.figure_field("gd-figure", "Boxes")
            shown = gr.CheckboxGroup([], value=[], label="Labels shown", visible=False, elem_id="gd-shown")
            threshold = components.threshold_field(state)
            threshold.elem_id = "gd-threshold"
            nms = components.nms_field(state)
            info = "Show only labels whose best word has at least this score."
            text_threshold = CheckedSlider(0, 1, value=0.0, step=0.01, label="Word threshold", info=info)
            found = components.html_field("gd-table")
            settings = [threshold, nms, text_threshold, shown]
            with gr.Row(elem_classes="gd-downloads"):
                components.download_button("Download JSON", _Download(state, "json"), [key, *settings], "gd-json")
                components.download_button("Download COCO", _Download(state, "coco"), [key, *settings], "gd-coco")
                components.download_button("Download PNG", _Download(state, "png"), [key, *settings], "gd-png")
    if state.examples:
        gr.Examples(state.examples, [image, labels], label="Examples")

    def on_detect(
        image: Picture | None, labels: str, negatives: str, mode: str, model: str, threshold: float, nms: float,
        text_threshold: float, key: str | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        outputs = _run(state, image, labels, negatives, mode, model)
        assert image is not None
        chosen = components.read_settings(threshold, nms, text_threshold)
        text, boxes, rows = render.result(outputs, chosen)
        names = list(outputs.labels)
        return (
            state.kept.put(outputs, replaces=key),
            text,
            gr.HTML(value=boxes, **render.photograph(image.image, f"The picture {outputs.name}")),
            rows,
            gr.CheckboxGroup(choices=names, value=names, visible=len(names) > 1),
        )

    def on_change(
        key: str | None, threshold: float, nms: float, text_threshold: float, shown: list[str]
    ) -> tuple[Any, ...]:
        outputs = state.kept.get(key)
        if outputs is None:
            return (components.GONE if key else gr.skip(), gr.skip(), gr.skip())
        return render.result(outputs, _settings(outputs, threshold, nms, text_threshold, shown))

    def detect_endpoint(
        image: Picture | None, labels: str, negatives: str, mode: str, model: str, threshold: float, nms: float,
        text_threshold: float,
    ) -> dict[str, Any]:  # fmt: skip
        """Detect the labels in one picture; returns labels, scores, and xyxy boxes in pixels."""
        outputs = _run(state, image, labels, negatives, mode, model)
        chosen = components.read_settings(threshold, nms, text_threshold)
        return render.report(outputs, outputs.detections(chosen), chosen)

    def detect_url_endpoint(
        address: str, labels: str, negatives: str, mode: str, model: str, threshold: float, nms: float,
        text_threshold: float,
    ) -> dict[str, Any]:  # fmt: skip
        """Detect the labels in a picture at a public http(s) address; returns what /detect does."""
        picture = read_picture(fetch(address), address)
        return detect_endpoint(picture, labels, negatives, mode, model, threshold, nms, text_threshold)

    query = [labels, negatives, mode, model, threshold, nms, text_threshold]
    gr.on(
        [detect.click, labels.submit, negatives.submit],
        on_detect,
        [image, *query, key],
        [key, status, figure, found, shown],
        api_visibility="private",
        show_progress_on=status,
        **components.RUNS_A_MODEL,
    )
    gr.on(
        [threshold.change, nms.change, text_threshold.change, shown.input],
        on_change,
        [key, *settings],
        [status, figure, found],
        api_visibility="private",
        **components.FILTERS,
    )
    gr.on([load.click, address.submit], _load, address, image, api_visibility="private", concurrency_limit=4)
    components.endpoint(detect_endpoint, [image, *query], "detect")
    components.endpoint(detect_url_endpoint, [address, *query], "detect_url")


def _run(state: PageState, image: Picture | None, labels: str, negatives: str, mode: str, model: str) -> Outputs:
    """Run a model with the values of the fields."""
    if image is None:
        raise Refused("There is no picture; upload one, paste it, or load it from an address.")
    wanted, competing = components.read_query(labels, negatives, mode)
    return state.models.run(model, image, wanted, competing, grounding=mode == GROUND)


def _settings(outputs: Outputs, threshold: float, nms: float, text_threshold: float, shown: list[str]) -> Settings:
    """Return the settings of sliders and switches; labels that are not shown are hidden."""
    return components.read_settings(threshold, nms, text_threshold, frozenset(outputs.labels) - set(shown))


def _load(address: str) -> str:
    """Download the picture at an address and return the path of the file for the image field."""
    picture = read_picture(fetch(address), address.partition("?")[0])
    extension, data = _EXTENSIONS.get(picture_format(picture.data, picture.data[-END_BYTES:]) or ""), picture.data
    if extension is None:
        buffer = io.BytesIO()
        picture.image.save(buffer, "PNG")
        extension, data = ".png", buffer.getvalue()
    return components.write_file(f"{picture.name.rsplit('.', 1)[0]}{extension}", data)


class _Download:
    """Function of a download button, which writes a file with the detections that are shown.

    Args:
        state: The state of the page.
        kind: Kind of file, "json", "coco" or "png".
    """

    def __init__(self, state: PageState, kind: str) -> None:
        self.state, self.kind = state, kind

    def __call__(self, key: str | None, threshold: float, nms: float, text_threshold: float, shown: list[str]) -> str:
        """Write the file and return its path."""
        outputs = self.state.kept.get(key)
        if outputs is None:
            raise Refused("There is nothing to download, or the results have expired; press Detect.")
        settings = _settings(outputs, threshold, nms, text_threshold, shown)
        detections: list[Detection] = outputs.detections(settings)
        if self.kind == "json":
            return components.write_file(
                "detections.json", render.to_text(render.report(outputs, detections, settings))
            )
        if self.kind == "coco":
            return components.write_file("detections-coco.json", render.to_text(render.coco([(outputs, detections)])))
        buffer = io.BytesIO()
        render.annotated(read_picture(outputs.data, outputs.name).image, detections).save(buffer, "PNG")
        return components.write_file("detections.png", buffer.getvalue())
