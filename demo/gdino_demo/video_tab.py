"""The third tab: every n-th frame of a video, annotated, with one JSON for all frames."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gradio as gr

from . import parts, render
from .guard import GuardedSlider, GuardedVideo
from .parts import EVERY, Desk
from .safety import Picture, Refused
from .video import MOST_FRAMES, Reader, Writer


def build(desk: Desk) -> None:
    """Lay the tab out and connect it.

    Args:
        desk: The state of the page.
    """
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            video = GuardedVideo(label="Video", sources=["upload"], height=240, elem_id="gd-video", buttons=[])
            labels = parts.labels_field()
            negatives = parts.negatives_field()
            model = parts.model_field(desk)
            info = f"Every n-th frame is looked at, up to {MOST_FRAMES} frames."
            stride = GuardedSlider(1, 60, value=5, step=1, label="Frame stride", info=info)
            threshold = parts.threshold_field(desk)
            nms = parts.nms_field(desk)
            start = gr.Button("Detect in the video", variant="primary", elem_id="gd-video-start")
        with gr.Column(scale=6, min_width=320):
            status = parts.html_field("gd-video-status")
            annotated = gr.Video(
                label="Annotated video", interactive=False, elem_id="gd-video-out", buttons=["download"]
            )
            file = gr.File(label="Detections of every frame, JSON", elem_id="gd-video-json")

    def on_start(
        video: str | None, labels: str, negatives: str, model: str, stride: float, threshold: float, nms: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  gradio finds the bar by this default
    ) -> tuple[Any, ...]:  # fmt: skip
        target = Path(parts.write_file("annotated.mp4", b""))
        data = _run(desk, video, labels, negatives, model, int(stride), threshold, nms, progress, target)
        text = f"<p><strong>{len(data['frames'])} frames</strong> looked at, every {data['stride']}</p>"
        if data["stopped_early"]:
            text += f"<p>The video goes on: {MOST_FRAMES} frames are the most, choose a larger stride.</p>"
        path = parts.write_file("frames.json", render.to_text(data))
        return f'<div class="gd-status" role="status">{text}</div>', str(target), path

    def video_endpoint(
        video: str | None, labels: str, negatives: str, model: str, stride: float, threshold: float, nms: float
    ) -> dict[str, Any]:
        """Find what the labels name in every n-th frame of a video: for each its number, time and detections."""
        return _run(desk, video, labels, negatives, model, int(stride), threshold, nms, None, None)

    query = [video, labels, negatives, model, stride, threshold, nms]
    start.click(
        on_start,
        query,
        [status, annotated, file],
        api_visibility="private",
        show_progress_on=status,
        **parts.RUNS_A_MODEL,
    )
    parts.endpoint(video_endpoint, query, "video")


def _run(
    desk: Desk,
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
    """Detections of the frames; the annotated video goes to `target`."""
    if video is None:
        raise Refused("There is no video; upload one.")
    wanted, competing = parts.read_query(labels, negatives, EVERY)
    desk.models.check(model, wanted, competing)
    settings = parts.read_settings(threshold, nms)
    reader = Reader(video, stride)
    writer = Writer(target, reader.rate / reader.stride) if target is not None else None
    frames: list[dict[str, Any]] = []
    size = (0, 0)
    try:
        for frame in reader:
            if progress is not None:
                progress((len(frames), reader.expected), desc="Looking at frames", unit="frames")
            outputs = desk.models.run(model, Picture(frame.image, b"", "frame"), wanted, competing)
            detections = outputs.detections(settings)
            size = outputs.size
            frames.append(
                {
                    "frame": frame.number,
                    "seconds": round(frame.seconds, 3),
                    "detections": [detection.as_json() for detection in detections],
                }
            )
            if writer is not None:
                writer.add(render.annotated(frame.image, detections))
    finally:
        if writer is not None:
            writer.close()
    return {
        "video": os.path.basename(video),
        "model": model,
        "labels": wanted,
        "negative_labels": competing,
        "width": size[0],
        "height": size[1],
        "frames_per_second": float(reader.rate),
        "stride": reader.stride,
        "stopped_early": reader.stopped,
        "box_format": "xyxy",
        "frames": frames,
    }
