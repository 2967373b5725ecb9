"""Annotated frames: boxes with labels and track ids, each track in a colour of its own, and counts."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..visualize import draw_detections, label_color, text_color
from .counting import Counts
from .tracked_frames import TrackedFrame

_LINE_COLOR = (255, 255, 255)


def draw_tracks(frame: TrackedFrame, counts: Counts | None = None, **options: Any) -> Image.Image:
    """Draw the tracked objects of a frame.

    Args:
        frame: The frame.
        counts: Lines and zones to draw with their counts so far; None for none.
        **options: Options of `gdino_hf.visualize.draw_detections`.

    Returns:
        A new RGB image. A label with a colour of its own keeps it for all of its tracks.
    """
    found = frame.found
    ids = found.track_ids.tolist() if found.track_ids is not None else []
    texts = [f"{label} #{number}" for label, number in zip(found.text_labels, ids, strict=True)]
    own = {
        text: found.colors[label] for text, label in zip(texts, found.text_labels, strict=True) if label in found.colors
    }
    picture = draw_detections(frame.image, found.as_result() | {"text_labels": texts}, colors=own, **options)
    if counts is not None:
        _draw_counts(picture, counts)
    return picture


def _draw_counts(picture: Image.Image, counts: Counts) -> None:
    draw = ImageDraw.Draw(picture)
    size = max(11, round(max(picture.size) / 42))
    font = ImageFont.load_default(size)
    width = max(2, round(max(picture.size) / 280))
    for points, text in zip((*counts.lines, *counts.zones), counts.now(), strict=True):
        draw.line([*points, *(points[:1] if len(points) > 2 else [])], fill=_LINE_COLOR, width=width)
        x, y = (sum(place) / len(points) for place in zip(*points, strict=True))
        area = draw.textbbox((x, y), text, font=font, anchor="mm")
        background = label_color(text.partition(" ")[0])
        draw.rectangle((area[0] - 3, area[1] - 3, area[2] + 3, area[3] + 3), fill=background)
        draw.text((x, y), text, font=font, anchor="mm", fill=text_color(background))
