"""Render detections as HTML for the page and as JSON, COCO and PNG for files. All text is escaped here."""

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

# The picture is a separate property, so that moving a slider resends only the boxes.
FIGURE_TEMPLATE = (
    '<figure class="gd-figure" style="--ratio:${ratio}">${picture}<div class="gd-boxes">${value}</div></figure>'
)


def result(outputs: Outputs, settings: Settings) -> tuple[str, str, str]:
    """Return what a tab shows for stored outputs: status, boxes and table."""
    detections = outputs.detections(settings)
    return status(outputs, detections, settings), boxes(detections, outputs.size), table(detections)


def photograph(image: Image.Image, alt: str) -> dict[str, Any]:
    """Return the picture as an element that contains its pixels, so that no file needs to be stored.

    Args:
        image: Upright RGB picture.
        alt: Description for screen readers.

    Returns:
        Values for `FIGURE_TEMPLATE`: "picture", an img element, and "ratio", width over height.
    """
    shown = image
    if max(image.size) > LONGEST_SIDE_SHOWN:
        shown = image.copy()
        shown.thumbnail((LONGEST_SIDE_SHOWN, LONGEST_SIDE_SHOWN))
    code = base64.b64encode(jpeg(shown)).decode()
    element = f'<img alt="{html.escape(alt)}" src="data:image/jpeg;base64,{code}">'
    return {"picture": element, "ratio": round(image.width / image.height, 4)}


def boxes(detections: Sequence[Detection], size: tuple[int, int]) -> str:
    """Return the boxes over the picture, in per cent of its size, so that they fit at any width.

    Every box can be reached with the keyboard and announces its label and score. Large boxes come first, so that the
    pointer can reach a small box inside a large one.

    Args:
        detections: Detections to show.
        size: (width, height) of the picture in pixels.

    Returns:
        HTML with one element per box.
    """
    elements = []
    for number, detection in sorted(enumerate(detections), key=lambda pair: -_area(pair[1].box)):
        left, top, right, bottom = _shares(detection.box, size)
        color = label_color(detection.label)
        name = html.escape(f"{detection.label} {detection.score:.2f}")
        # The label stands inside the box if there is no room above it.
        place = " gd-inside" if top < 0.06 else ""
        side = " gd-right" if left > 0.7 else ""
        elements.append(
            f'<div class="gd-box{place}{side}" tabindex="0" role="img" aria-label="{name}" title="{name}" '
            f'data-box="{number}" style="left:{left:.3%};top:{top:.3%};width:{right - left:.3%};'
            f'height:{bottom - top:.3%};--box:{_css(color)};--ink:{_css(text_color(color))}"><span>{name}</span></div>'
        )
    return "".join(elements)


def table(detections: Sequence[Detection]) -> str:
    """Return a table with label, score and box of every detection.

    Args:
        detections: Detections to show, best first.

    Returns:
        HTML of the table.
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
    """Return the number of detections, the model's run time and device, and advice if nothing was found.

    Args:
        outputs: The model's outputs.
        detections: Detections that are shown.
        settings: The thresholds.

    Returns:
        HTML of an element that screen readers announce.
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
            parts.append(f"<p>No box above the threshold: {html.escape(', '.join(missing))}</p>")
    if not detections:
        parts.append(f"<p>{html.escape(advice(outputs, settings))}</p>")
    parts.append(remarks(outputs))
    return f'<div class="gd-status" role="status">{"".join(parts)}</div>'


def remarks(outputs: Outputs) -> str:
    """Return what is odd about the labels as HTML paragraphs, empty if there is nothing."""
    return "".join(f"<p>{html.escape(remark)}</p>" for remark in getattr(outputs, "remarks", ()))


def advice(outputs: Outputs, settings: Settings) -> str:
    """Return why a result is empty: the best score, and which setting would show it."""
    best = outputs.best()
    if best is None:
        if outputs.negatives:
            return "Every candidate fits a negative label better; remove some of them, or try other words."
        return "The model has no candidate for these labels; try other words."
    found = f"The best candidate is {best.label} with a score of {best.score:.3f}"
    if best.label in settings.hidden:
        return f"{found}, and that label is switched off; switch it on below the picture."
    # Rounded down, so that the advised threshold shows the box.
    lower = int(best.score * 100) / 100
    if best.score <= settings.threshold:
        return f"{found}: lower the threshold from {settings.threshold:.2f} to {lower:.2f} or below to see it."
    return f"{found}: lower the word threshold from {settings.text_threshold:.2f} to see it."


def report(outputs: Outputs, detections: Sequence[Detection], settings: Settings) -> dict[str, Any]:
    """Return the result as data, for the JSON download and the API.

    Args:
        outputs: The model's outputs.
        detections: Detections that passed the thresholds.
        settings: The thresholds.

    Returns:
        The settings, "width" and "height" in pixels, "detections" with xyxy boxes in pixels, and "remarks" if there is
        something odd about the labels.
    """
    odd = list(getattr(outputs, "remarks", ()))
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
        **({"remarks": odd} if odd else {}),
    }


def coco(results: Sequence[tuple[Outputs, Sequence[Detection]]]) -> dict[str, Any]:
    """Return the detections of any number of pictures as the content of a COCO file.

    Args:
        results: (outputs, detections) of every picture.

    Returns:
        "images", "categories" numbered from 1 in the order of the labels, and "annotations" with scores and with xywh
        boxes in pixels, clipped to the picture.
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
    """Draw boxes and labels into a copy of the picture."""
    return draw_detections(
        image,
        {
            "boxes": [detection.box for detection in detections],
            "scores": [detection.score for detection in detections],
            "text_labels": [detection.label for detection in detections],
        },
    )


def jpeg(image: Image.Image) -> bytes:
    """Encode the picture as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def to_text(data: dict[str, Any]) -> str:
    """Format data as JSON for files."""
    return json.dumps(data, ensure_ascii=False, indent=2) + "\n"


def _shares(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Clip a box to the picture, since a model may place a side slightly outside, and return it in 0..1."""
    left, top, right, bottom = (
        min(max(side / limit, 0.0), 1.0) for side, limit in zip(box, (*size, *size), strict=True)
    )
    return left, top, max(right, left), max(bottom, top)


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _css(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
