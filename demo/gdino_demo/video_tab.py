"""The tab "Video": every n-th frame of a video, as an annotated video and one JSON file."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import Any

import gradio as gr

from . import components, render
from .components import PageState
from .queries import read_query
from .request_limits import CheckedSlider, CheckedVideo
from .safety import Picture, Refused
from .video import MOST_FRAMES, Reader, Writer


def build(state: PageState) -> None:
    """Create the tab's components, events and endpoints.

    Args:
        state: The state of the page.
    """
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            video = CheckedVideo(label="Video", sources=["upload"], height=240, elem_id="gd-video", buttons=[])
            labels = components.labels_field()
            info = f"1 searches every frame, 5 every fifth; at most {MOST_FRAMES} frames."
            stride = CheckedSlider(1, 60, value=5, step=1, label="Frame stride", info=info)
            start = gr.Button("Detect in the video", variant="primary", elem_id="gd-video-start")
            with gr.Accordion("More: negative labels, model, thresholds", open=False):
                negatives = components.negatives_field()
                model = components.model_field(state)
                threshold = components.threshold_field(state.threshold)
                nms = components.nms_field(state)
        with gr.Column(scale=6, min_width=320):
            status = components.html_field("gd-video-status")
            annotated = gr.Video(
                label="Annotated video", interactive=False, elem_id="gd-video-out", buttons=["download"]
            )
            file = gr.File(label="Detections of every frame, JSON", elem_id="gd-video-json")

    def on_start(
        video: str | None, labels: str, negatives: str, model: str, stride: float, threshold: float, nms: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  gradio recognizes the progress bar by this default
    ) -> tuple[Any, ...]:  # fmt: skip
        target = Path(components.write_file("annotated.mp4", b""))
        data = _run(state, video, labels, negatives, model, int(stride), threshold, nms, progress, target)
        text = f"<p><strong>{len(data['frames'])} frames</strong> searched, stride {data['stride']}</p>"
        if data["stopped_early"]:
            text += (
                f"<p>The video is longer, but at most {MOST_FRAMES} frames are searched; choose a larger stride.</p>"
            )
        text += "".join(f"<p>{html.escape(remark)}</p>" for remark in data.get("remarks", ()))
        path = components.write_file("frames.json", render.to_text(data))
        return f'<div class="gd-status" role="status">{text}</div>', str(target), path

    def video_endpoint(
        video: str | None, labels: str, negatives: str, model: str, stride: float, threshold: float, nms: float
    ) -> dict[str, Any]:
        """Detect the labels in every n-th frame of a video; returns the number, time and detections of each frame."""
        return _run(state, video, labels, negatives, model, int(stride), threshold, nms, None, None)

    query = [video, labels, negatives, model, stride, threshold, nms]
    start.click(
        on_start,
        query,
        [status, annotated, file],
        api_visibility="private",
        show_progress_on=status,
        **components.RUNS_A_MODEL,
    )
    components.endpoint(video_endpoint, query, "video")


def _run(
    state: PageState,
    video: str | None,
    labels: str,
    negatives: str,
    model: str,
    stride: int,
    threshold: float,
    nms: float,
    progress: gr.Progress | None,
    target: Path | None,
) -> dict[str, Any]:
    """Return the detections of the frames, and write the annotated video to `target` unless it is None."""
    if video is None:
        raise Refused("There is no video; upload one.")
    query = read_query(labels, negatives)
    state.models.check(model, query)
    settings = components.read_settings(threshold, nms)
    reader = Reader(video, stride)
    writer = Writer(target, reader.rate / reader.stride) if target is not None else None
    frames: list[dict[str, Any]] = []
    names: tuple[str, ...] = ()
    size = (0, 0)
    odd: tuple[str, ...] = ()
    try:
        for frame in reader:
            if progress is not None:
                progress((len(frames), reader.expected), desc="Detecting", unit="frames")
            outputs = state.models.run(model, Picture(frame.image, b"", "frame"), query)
            found = outputs.detections(settings)
            names, size, odd = outputs.labels, outputs.size, outputs.remarks
            frames.append(
                {
                    "frame": frame.number,
                    "seconds": round(frame.seconds, 3),
                    "detections": render.rows(found),
                }
            )
            if writer is not None:
                writer.add(found.plot(frame.image))
    finally:
        if writer is not None:
            writer.close()
    return {
        "video": os.path.basename(video),
        "model": model,
        "labels": list(names),
        "negative_labels": list(query.negatives),
        "width": size[0],
        "height": size[1],
        "frames_per_second": float(reader.rate),
        "stride": reader.stride,
        "stopped_early": reader.stopped,
        "box_format": "xyxy",
        "frames": frames,
        **({"remarks": list(odd)} if odd else {}),
    }
