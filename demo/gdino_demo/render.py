"""Detections as HTML for the page, and as JSON, COCO and PNG for files. Every text is escaped here."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from typing import Any

from PIL import Image

from gdino_hf.visualize import draw_detections, label_color, text_color

from .engine import Detection, Outputs, Settings

LONGEST_SIDE_SHOWN = 1280

# The photograph is a property of its own, so that moving a slider sends the boxes alone.
FIGURE_TEMPLATE = (
    '<figure class="gd-figure" style="--ratio:${ratio}">${picture}<div class="gd-boxes">${value}</div></figure>'
)


def result(outputs: Outputs, settings: Settings) -> tuple[str, str, str]:
    """What a tab shows of kept outputs: status, boxes and table."""
    detections = outputs.detections(settings)
    return status(outputs, detections, settings), boxes(detections, outputs.size), table(detections)


def photograph(image: Image.Image, alt: str) -> dict[str, Any]:
    """The picture as an element that carries its pixels: no file has to be kept for it.

    Args:
        image: Upright RGB.
        alt: What a screen reader says.

    Returns:
        What `FIGURE_TEMPLATE` shows besides the boxes: "picture", an img element, and "ratio", width over height.
    """
    shown = image
    if max(image.size) > LONGEST_SIDE_SHOWN:
        shown = image.copy()
        shown.thumbnail((LONGEST_SIDE_SHOWN, LONGEST_SIDE_SHOWN))
    code = base64.b64encode(jpeg(shown)).decode()
    element = f'<img alt="{html.escape(alt)}" src="data:image/jpeg;base64,{code}">'
    return {"picture": element, "ratio": round(image.width / image.height, 4)}


def boxes(detections: Sequence[Detection], size: tuple[int, int]) -> str:
    """Boxes over the photograph, in per cent of it, so that they fit at any width.

    Every box can be reached with the keyboard and says its label and score. Large boxes come first, so that a small
    one inside can be pointed at.

    Args:
        detections: What to show.
        size: (width, height) of the picture in pixels.

    Returns:
        One element per box.
    """
    elements = []
    for number, detection in sorted(enumerate(detections), key=lambda pair: -_area(pair[1].box)):
        left, top, right, bottom = _shares(detection.box, size)
        color = label_color(detection.label)
        name = html.escape(f"{detection.label} {detection.score:.2f}")
        # Where there is no room above the box, its label stands inside.
        place = " gd-inside" if top < 0.06 else ""
        side = " gd-right" if left > 0.7 else ""
        elements.append(
            f'<div class="gd-box{place}{side}" tabindex="0" role="img" aria-label="{name}" title="{name}" '
            f'data-box="{number}" style="left:{left:.3%};top:{top:.3%};width:{right - left:.3%};'
            f'height:{bottom - top:.3%};--box:{_css(color)};--ink:{_css(text_color(color))}"><span>{name}</span></div>'
        )
    return "".join(elements)


def table(detections: Sequence[Detection]) -> str:
    """Label, score and box of every detection.

    Args:
        detections: Best first.

    Returns:
        A table element.
    """
    rows = "".join(
        f'<tr><td><i class="gd-dot" style="background:{_css(label_color(d.label))}"></i>{html.escape(d.label)}</td>'
        f"<td>{d.score:.3f}</td><td>{' '.join(str(round(side)) for side in d.box)}</td></tr>"
        for d in detections
    )
    rows = rows or '<tr><td colspan="3">nothing</td></tr>'
    return (
        '<table class="gd-table"><caption>Detections, best first; boxes are left, top, right and bottom in pixels'
        '</caption><thead><tr><th scope="col">Label</th><th scope="col">Score</th><th scope="col">Box</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def status(outputs: Outputs, detections: Sequence[Detection], settings: Settings) -> str:
    """What was found, how long the model took and where; for an empty result what would change it.

    Args:
        outputs: What the model said.
        detections: What is shown of it.
        settings: The thresholds.

    Returns:
        An element that screen readers announce.
    """
    count = f"<strong>{len(detections)} detection{'s' * (len(detections) != 1)}</strong>"
    ran = (
        f"{1000 * outputs.seconds:.0f} ms with {html.escape(outputs.model)} on {html.escape(outputs.device)}, "
        f"deformable attention in {html.escape(outputs.backend)}"
    )
    parts = [f"<p>{count} · {ran}</p>"]
    if outputs.grounding:
        seen = {detection.label for detection in detections} | settings.hidden
        missing = [label for label in outputs.labels if label not in seen]
        phrases = " · ".join(html.escape(label) for label in outputs.labels)
        parts.append(f"<p>Phrases: {phrases}</p>")
        if missing and detections:
            parts.append(f"<p>Without a box above the threshold: {html.escape(', '.join(missing))}</p>")
    if not detections:
        parts.append(f"<p>{html.escape(advice(outputs, settings))}</p>")
    return f'<div class="gd-status" role="status">{"".join(parts)}</div>'


def advice(outputs: Outputs, settings: Settings) -> str:
    """Why a result is empty: the best score there is, and what to change to see it."""
    best = outputs.best()
    if best is None:
        if outputs.negatives:
            return "The negative labels take every candidate; leave some of them out, or try other words."
        return "The model has no candidate for these labels; try other words."
    found = f"The best candidate is {best.label} with a score of {best.score:.3f}"
    if best.label in settings.hidden:
        return f"{found}, and that label is switched off; switch it on below the picture."
    # Rounded down, so that following the advice shows the box.
    lower = int(best.score * 100) / 100
    if best.score <= settings.threshold:
        return f"{found}: lower the threshold from {settings.threshold:.2f} to {lower:.2f} or below to see it."
    return f"{found}: lower the word threshold from {settings.text_threshold:.2f} to see it."


def report(outputs: Outputs, detections: Sequence[Detection], settings: Settings) -> dict[str, Any]:
    """The result as data, as the JSON download and the API give it.

    Args:
        outputs: What the model said.
        detections: What passed the thresholds.
        settings: Those.

    Returns:
        The settings, "width" and "height" in pixels, and "detections" with xyxy boxes.
    """
    return {
        "image": outputs.name,
        "width": outputs.size[0],
        "height": outputs.size[1],
        "model": outputs.model,
        "labels": list(outputs.labels),
        "negative_labels": list(outputs.negatives),
        "threshold": settings.threshold,
        "text_threshold": settings.text_threshold,
        "nms": settings.nms if settings.nms < 1 else None,
        "box_format": "xyxy",
        "seconds": round(outputs.seconds, 4),
        "device": outputs.device,
        "backend": outputs.backend,
        "detections": [detection.as_json() for detection in detections],
    }


def coco(results: Sequence[tuple[Outputs, Sequence[Detection]]]) -> dict[str, Any]:
    """Detections of any number of pictures as one COCO file.

    Args:
        results: For every picture the outputs and its detections.

    Returns:
        "images", "categories" from 1 on in the order of the labels, and "annotations" with xywh boxes cut at the
        borders of the picture, and their scores.
    """
    names = list(dict.fromkeys(label for outputs, _ in results for label in outputs.labels))
    number = {name: index for index, name in enumerate(names, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (outputs, detections) in enumerate(results, start=1):
        width, height = outputs.size
        images.append({"id": image_id, "file_name": outputs.name, "width": width, "height": height})
        for detection in detections:
            shares = _shares(detection.box, outputs.size)
            left, top, right, bottom = (
                side * limit for side, limit in zip(shares, (width, height, width, height), strict=True)
            )
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": number[detection.label],
                    "bbox": [round(x, 2) for x in (left, top, right - left, bottom - top)],
                    "area": round((right - left) * (bottom - top), 2),
                    "iscrowd": 0,
                    "score": detection.score,
                }
            )
    categories = [{"id": index, "name": name} for name, index in number.items()]
    return {"images": images, "categories": categories, "annotations": annotations}


def annotated(image: Image.Image, detections: Sequence[Detection]) -> Image.Image:
    """The picture with boxes and labels drawn in."""
    return draw_detections(
        image,
        {
            "boxes": [detection.box for detection in detections],
            "scores": [detection.score for detection in detections],
            "text_labels": [detection.label for detection in detections],
        },
    )


def jpeg(image: Image.Image) -> bytes:
    """The picture as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def to_text(data: dict[str, Any]) -> str:
    """JSON as it is written to files."""
    return json.dumps(data, ensure_ascii=False, indent=2) + "\n"


def _shares(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box cut at the borders, in shares of the picture: the model may place a side a little beyond."""
    left, top, right, bottom = (
        min(max(side / limit, 0.0), 1.0) for side, limit in zip(box, (*size, *size), strict=True)
    )
    return left, top, max(right, left), max(bottom, top)


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _css(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
