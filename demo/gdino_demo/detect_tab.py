"""The first tab: one picture, labels, boxes; sliders and switches act on kept outputs."""

from __future__ import annotations

import io
from typing import Any

import gradio as gr
from PIL import Image

from . import parts, render
from .engine import Detection, Outputs, Settings
from .fetch import fetch
from .guard import GuardedImage, GuardedSlider
from .parts import EVERY, GROUND, Desk
from .safety import Picture, Refused, read_picture

_EMPTY = '<div class="gd-status"><p>Choose a picture, name what to look for, and press Detect.</p></div>'
_EXTENSIONS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}


def build(desk: Desk) -> None:
    """Lay the tab out and connect it.

    Args:
        desk: The state of the page.
    """
    key = gr.State(None)
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            image = GuardedImage(
                label="Picture",
                sources=["upload", "webcam", "clipboard"],
                type="filepath",
                height=300,
                buttons=[],
                elem_id="gd-picture",
                alt_text="The picture to look at",
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
            labels = parts.labels_field()
            labels.elem_id = "gd-labels"
            detect = gr.Button("Detect", variant="primary", elem_id="gd-detect")
            with gr.Accordion("Mode, negative labels, model", open=False, elem_id="gd-more"):
                mode = gr.Radio([EVERY, GROUND], value=EVERY, label="Mode", elem_id="gd-mode")
                negatives = parts.negatives_field()
                model = parts.model_field(desk)
        with gr.Column(scale=6, min_width=320):
            status = parts.html_field("gd-status", _EMPTY)
            figure = parts.figure_field("gd-figure", "Boxes")
            shown = gr.CheckboxGroup([], value=[], label="Labels shown", visible=False, elem_id="gd-shown")
            threshold = parts.threshold_field(desk)
            threshold.elem_id = "gd-threshold"
            nms = parts.nms_field(desk)
            info = "The best word of a label scores at least this."
            text_threshold = GuardedSlider(0, 1, value=0.0, step=0.01, label="Word threshold", info=info)
            found = parts.html_field("gd-table")
            settings = [threshold, nms, text_threshold, shown]
            with gr.Row(elem_classes="gd-downloads"):
                parts.download_button("Download JSON", _Download(desk, "json"), [key, *settings], "gd-json")
                parts.download_button("Download COCO", _Download(desk, "coco"), [key, *settings], "gd-coco")
                parts.download_button("Download PNG", _Download(desk, "png"), [key, *settings], "gd-png")
    if desk.examples:
        gr.Examples(desk.examples, [image, labels], label="Examples")

    def on_detect(
        image: Picture | None, labels: str, negatives: str, mode: str, model: str, threshold: float, nms: float,
        text_threshold: float, key: str | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        outputs = _ask(desk, image, labels, negatives, mode, model)
        assert image is not None
        chosen = parts.read_settings(threshold, nms, text_threshold)
        text, boxes, rows = render.result(outputs, chosen)
        names = list(outputs.labels)
        return (
            desk.kept.put(outputs, replaces=key),
            text,
            gr.HTML(value=boxes, **render.photograph(image.image, f"The picture {outputs.name}")),
            rows,
            gr.CheckboxGroup(choices=names, value=names, visible=len(names) > 1),
        )

    def on_change(
        key: str | None, threshold: float, nms: float, text_threshold: float, shown: list[str]
    ) -> tuple[Any, ...]:
        outputs = desk.kept.get(key)
        if outputs is None:
            return (parts.GONE if key else gr.skip(), gr.skip(), gr.skip())
        return render.result(outputs, _chosen(outputs, threshold, nms, text_threshold, shown))

    def detect_endpoint(
        image: Picture | None, labels: str, negatives: str, mode: str, model: str, threshold: float, nms: float,
        text_threshold: float,
    ) -> dict[str, Any]:  # fmt: skip
        """Find what the labels name in one picture: the labels found, their scores, and xyxy boxes in pixels."""
        outputs = _ask(desk, image, labels, negatives, mode, model)
        chosen = parts.read_settings(threshold, nms, text_threshold)
        return render.report(outputs, outputs.detections(chosen), chosen)

    def detect_url_endpoint(
        address: str, labels: str, negatives: str, mode: str, model: str, threshold: float, nms: float,
        text_threshold: float,
    ) -> dict[str, Any]:  # fmt: skip
        """Like /detect, for a picture on the web: an http(s) address that anyone can open."""
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
        **parts.RUNS_A_MODEL,
    )
    gr.on(
        [threshold.change, nms.change, text_threshold.change, shown.input],
        on_change,
        [key, *settings],
        [status, figure, found],
        api_visibility="private",
        **parts.FILTERS,
    )
    gr.on([load.click, address.submit], _load, address, image, api_visibility="private", concurrency_limit=4)
    parts.endpoint(detect_endpoint, [image, *query], "detect")
    parts.endpoint(detect_url_endpoint, [address, *query], "detect_url")


def _ask(desk: Desk, image: Picture | None, labels: str, negatives: str, mode: str, model: str) -> Outputs:
    if image is None:
        raise Refused("There is no picture; upload one, paste it, or load it from an address.")
    wanted, competing = parts.read_query(labels, negatives, mode)
    return desk.models.run(model, image, wanted, competing, grounding=mode == GROUND)


def _chosen(outputs: Outputs, threshold: float, nms: float, text_threshold: float, shown: list[str]) -> Settings:
    return parts.read_settings(threshold, nms, text_threshold, frozenset(outputs.labels) - set(shown))


def _load(address: str) -> str:
    """The file at an address, for the image field."""
    picture = read_picture(fetch(address), address.partition("?")[0])
    kind = Image.open(io.BytesIO(picture.data)).format or ""
    return parts.write_file(f"{picture.name.rsplit('.', 1)[0]}{_EXTENSIONS[kind]}", picture.data)


class _Download:
    """Makes a file of what is shown.

    Args:
        desk: The state of the page.
        kind: "json", "coco" or "png".
    """

    def __init__(self, desk: Desk, kind: str) -> None:
        self.desk, self.kind = desk, kind

    def __call__(self, key: str | None, threshold: float, nms: float, text_threshold: float, shown: list[str]) -> str:
        """The path of the file."""
        outputs = self.desk.kept.get(key)
        if outputs is None:
            raise Refused("There is nothing to download, or it was removed after a while; press Detect.")
        settings = _chosen(outputs, threshold, nms, text_threshold, shown)
        detections: list[Detection] = outputs.detections(settings)
        if self.kind == "json":
            return parts.write_file("detections.json", render.to_text(render.report(outputs, detections, settings)))
        if self.kind == "coco":
            return parts.write_file("detections-coco.json", render.to_text(render.coco([(outputs, detections)])))
        buffer = io.BytesIO()
        render.annotated(read_picture(outputs.data, outputs.name).image, detections).save(buffer, "PNG")
        return parts.write_file("detections.png", buffer.getvalue())
