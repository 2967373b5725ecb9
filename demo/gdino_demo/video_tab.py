"""The tab "Video": objects followed through a video, as an annotated video and files of tracks."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import gradio as gr

from . import components
from .components import PageState
from .masks import OFF
from .queries import read_query
from .request_limits import CheckedSlider, CheckedVideo
from .safety import Refused
from .tracked_video import ANNOTATED, FILES, LONGEST_WORK, Tracked, found_in_frames, track_video

# Frames between two detections wait in memory until the second is made.
_LARGEST_STRIDE = 30
# Rows of the table of tracks; the file has all of them.
_ROWS = 50


def build(state: PageState) -> None:
    """Create the tab's components, events and endpoints.

    Args:
        state: The state of the page.
    """
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            video = CheckedVideo(label="Video", sources=["upload"], height=240, elem_id="gd-video", buttons=[])
            labels = components.labels_field()
            info = (
                "1 searches every frame, 5 every fifth, and boxes in the frames between are placed from one to the "
                f"next. A video is searched for up to {LONGEST_WORK:g} seconds."
            )
            stride = CheckedSlider(1, _LARGEST_STRIDE, value=5, step=1, label="Frame stride", info=info)
            start = gr.Button("Follow in the video", variant="primary", elem_id="gd-video-start")
            with gr.Accordion("More: negative labels, model, thresholds", open=False):
                negatives = components.negatives_field()
                model = components.model_field(state)
                info = "Also makes masks in the frames that are searched; a stride of 1 makes them in all."
                masks = components.masks_fields(state, info)
                threshold = components.threshold_field(state.threshold)
                nms = components.nms_field(state)
        with gr.Column(scale=6, min_width=320):
            status = components.html_field("gd-video-status")
            annotated = gr.Video(
                label="Annotated video", interactive=False, elem_id="gd-video-out", buttons=["download"]
            )
            files = gr.File(
                label="Tracks as JSON lines, table, MOT Challenge and COCO-VID, and a summary",
                file_count="multiple",
                interactive=False,
                elem_id="gd-video-files",
            )

    def on_start(
        video: str | None, labels: str, negatives: str, model: str, stride: float, threshold: float, nms: float,
        masks: str = OFF, progress: gr.Progress = gr.Progress(),  # noqa: B008  gradio recognizes the progress bar by this default
    ) -> tuple[Any, ...]:  # fmt: skip
        def tell(done: int, expected: int | None) -> None:
            progress((done, expected), desc="Following", unit="frames")

        folder = components.new_folder()
        tracked = _run(
            state, video, labels, negatives, model, int(stride), threshold, nms, masks, folder, progress=tell
        )
        return _status(tracked), str(folder / ANNOTATED), [str(folder / name) for name in FILES]

    def video_endpoint(
        video: str | None,
        labels: str,
        negatives: str,
        model: str,
        stride: float,
        threshold: float,
        nms: float,
        masks: str = OFF,
    ) -> dict[str, Any]:
        """Follow the labels through a video; returns the tracks, and for each frame the time and the detections."""
        folder = components.new_folder()
        tracked = _run(state, video, labels, negatives, model, int(stride), threshold, nms, masks, folder, draw=False)
        width, height = tracked.size
        return {
            **tracked.summary,
            "negative_labels": list(read_query(labels, negatives).negatives),
            "width": width,
            "height": height,
            "box_format": "xyxy",
            "frames": found_in_frames(folder),
        }

    query = [video, labels, negatives, model, stride, threshold, nms, *masks]
    start.click(
        on_start,
        query,
        [status, annotated, files],
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
    masks: str,
    folder: Path,
    **options: Any,
) -> Tracked:
    """Follow what the fields ask for, and write the files."""
    if video is None:
        raise Refused("There is no video; upload one.")
    settings = components.read_settings(threshold, nms)
    query = read_query(labels, negatives)
    return track_video(state.models, model, video, query, settings, stride, folder, masks=masks, **options)


def _status(tracked: Tracked) -> str:
    """Return the number of tracks and frames, what was cut off, and a table of the tracks as HTML."""
    rows, frames = tracked.summary["tracks"], tracked.summary["frames"]
    text = f"<p><strong>{len(rows)} track{'s' * (len(rows) != 1)}</strong> in {frames} frame{'s' * (frames != 1)}</p>"
    text += "".join(f"<p>{html.escape(remark)}</p>" for remark in tracked.remarks)
    if len(rows) > _ROWS:
        text += f"<p>The table shows the first {_ROWS} tracks; the files have all of them.</p>"
    return f'<div class="gd-status" role="status">{text}</div>{_table(rows[:_ROWS]) if rows else ""}'


def _table(rows: list[dict[str, Any]]) -> str:
    lines = "".join(
        f"<tr><td>{html.escape(row['label'])} #{row['track_id']}</td><td>{row['first_seconds']:.2f} s</td>"
        f"<td>{row['last_seconds']:.2f} s</td><td>{row['frames']}</td><td>{row['mean_score']:.2f}</td></tr>"
        for row in rows
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("Track", "First seen", "Last seen", "Frames", "Score"))
    return f'<table class="gd-table"><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>'
