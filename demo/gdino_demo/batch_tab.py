"""The tab "Batch": many pictures, a gallery of results, and one file with all of them."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from gdino_hf import Detections

from . import components, formats, render
from .components import PageState
from .masks import OFF
from .outputs import Outputs, Settings
from .queries import read_query
from .request_limits import CheckedFiles
from .safety import MOST_PICTURES, Refused, read_picture

_SHOWN = 640


def build(state: PageState) -> None:
    """Create the tab's components, events and endpoints.

    Args:
        state: The state of the page.
    """
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            files = CheckedFiles(
                label=f"Pictures, up to {MOST_PICTURES}",
                file_count="multiple",
                file_types=["image"],
                elem_id="gd-files",
            )
            labels = components.labels_field()
            format_name = components.format_field("gd-batch-format")
            start = gr.Button("Detect in all", variant="primary", elem_id="gd-batch")
            with gr.Accordion("More: negative labels, model, thresholds", open=False):
                negatives = components.negatives_field()
                model = components.model_field(state)
                masks = components.masks_fields(state)
                threshold = components.threshold_field(state.threshold)
                nms = components.nms_field(state)
        with gr.Column(scale=6, min_width=320):
            status = components.html_field("gd-batch-status")
            gallery = gr.Gallery(label="Annotated pictures", columns=3, object_fit="contain", elem_id="gd-gallery")
            file = gr.File(label="Results in the chosen format", elem_id="gd-batch-file")

    def on_start(
        files: list[tuple[str, str]] | None, labels: str, negatives: str, model: str, threshold: float, nms: float,
        format_name: str, masks: str = OFF, progress: gr.Progress = gr.Progress(),  # noqa: B008  gradio recognizes the progress bar by this default
    ) -> tuple[Any, ...]:  # fmt: skip
        settings = components.read_settings(threshold, nms)
        pictures: list[tuple[str, str]] = []
        results, failed = _run(state, files, labels, negatives, model, settings, masks, progress, pictures)
        path = components.write_file(*formats.format_file(format_name, _found(results, settings)))
        return _status(results, failed), pictures, path

    def batch_endpoint(
        files: list[tuple[str, str]] | None,
        labels: str,
        negatives: str,
        model: str,
        threshold: float,
        nms: float,
        masks: str = OFF,
    ) -> dict[str, Any]:
        """Detect the labels in many pictures; returns COCO data, with unreadable pictures in "failed"."""
        settings = components.read_settings(threshold, nms)
        results, failed = _run(state, files, labels, negatives, model, settings, masks, None, None)
        data = formats.coco_data(_found(results, settings) if results else [])
        return {**data, "failed": [{"image": name, "error": reason} for name, reason in failed]}

    query = [files, labels, negatives, model, threshold, nms]
    start.click(
        on_start,
        [*query, format_name, *masks],
        [status, gallery, file],
        api_visibility="private",
        show_progress_on=status,
        **components.RUNS_A_MODEL,
    )
    components.endpoint(batch_endpoint, [*query, *masks], "batch")


def _run(
    state: PageState,
    files: list[tuple[str, str]] | None,
    labels: str,
    negatives: str,
    model: str,
    settings: Settings,
    masks: str,
    progress: gr.Progress | None,
    drawn: list[tuple[str, str]] | None,
) -> tuple[list[tuple[Outputs, int]], list[tuple[str, str]]]:
    """Return outputs and numbers of detections of readable pictures, and (name, reason) of the others.

    Annotated pictures are appended to `drawn`.
    """
    if not files:
        raise Refused("There is no picture; choose some files.")
    if len(files) > MOST_PICTURES:
        raise Refused(f"There are {len(files)} files; one request takes {MOST_PICTURES}, choose fewer.")
    query = read_query(labels, negatives)
    state.models.check(model, query)
    state.models.check_masks(masks)
    results, failed = [], []
    for number, (path, name) in enumerate(files):
        if progress is not None:
            progress((number, len(files)), desc="Detecting", unit="pictures")
        try:
            picture = read_picture(path, name)
            outputs = state.models.run(model, picture, query, masks)
            found = outputs.detections(settings)
        except Refused as refusal:
            if len(files) == 1:
                raise
            failed.append((name, html.unescape(str(refusal.message))))
            continue
        if outputs.masks is not None:
            outputs.masks.forget_picture()
        results.append((outputs, len(found)))
        if drawn is not None:
            drawn.append((_small(picture.image, found), f"{outputs.name}: {len(found)}"))
    return results, failed


def _found(results: list[tuple[Outputs, int]], settings: Settings) -> Iterator[Detections]:
    """Yield the detections picture by picture, because the masks of all would not fit into memory together."""
    for outputs, _ in results:
        yield outputs.detections(settings)


def _small(image: Any, found: Detections) -> str:
    """Write the annotated picture to a file, scaled down for the gallery."""
    annotated = found.plot(image)
    annotated.thumbnail((_SHOWN, _SHOWN))
    return components.write_file("annotated.jpg", render.jpeg(annotated))


def _status(results: list[tuple[Outputs, int]], failed: list[tuple[str, str]]) -> str:
    """Return the numbers of detections and pictures, and the pictures that could not be read, as HTML."""
    number = sum(count for _, count in results)
    text = f"{number} detection{'s' * (number != 1)} in {len(results)} picture{'s' * (len(results) != 1)}"
    lines = "".join(f"<li>{html.escape(name)}: {html.escape(reason)}</li>" for name, reason in failed)
    skipped = f"<p>Skipped:</p><ul>{lines}</ul>" if failed else ""
    # All pictures have the same labels.
    odd = render.remarks(results[0][0]) if results else ""
    return f'<div class="gd-status" role="status"><p><strong>{text}</strong></p>{skipped}{odd}</div>'
