"""Render detections as HTML for the page, as data for programs, and as pictures. All text is escaped here."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageColor

from gdino_hf import Detections
from gdino_hf.detection.coco_exchange import encode_masks
from gdino_hf.visualize import label_color, text_color

from .outputs import Outputs, Settings

LONGEST_SIDE_SHOWN = 1280
_MASK_OPACITY = 110

# The picture is a separate property, so that moving a slider resends only the boxes.
FIGURE_TEMPLATE = (
    '<figure class="gd-figure" style="--ratio:${ratio}">${picture}<div class="gd-boxes">${value}</div></figure>'
)


def result(outputs: Outputs, settings: Settings) -> tuple[str, str, str, str]:
    """Return what a tab shows for stored outputs: status, boxes, presence of each label, and table of boxes."""
    found = outputs.detections(settings)
    return status(outputs, found, settings), boxes(found), presence(outputs, found, settings), table(found)


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


def boxes(found: Detections) -> str:
    """Return the boxes over the picture, in per cent of its size, so that they fit at any width.

    Every box can be reached with the keyboard and announces its label and score. Large boxes come first, so that the
    pointer can reach a small box inside a large one.

    Args:
        found: Detections to show.

    Returns:
        HTML with one element per box.
    """
    elements = []
    shares = (found.boxes / [*found.size, *found.size]).tolist()
    areas = found.areas.tolist()
    each = list(found)
    for number in sorted(range(len(each)), key=lambda place: -areas[place]):
        left, top, right, bottom = shares[number]
        color = _color(found, each[number].text_label)
        name = html.escape(f"{each[number].text_label} {each[number].score:.2f}")
        # The label stands inside the box if there is no room above it.
        place = " gd-inside" if top < 0.06 else ""
        side = " gd-right" if left > 0.7 else ""
        elements.append(
            f'<div class="gd-box{place}{side}" tabindex="0" role="img" aria-label="{name}" title="{name}" '
            f'data-box="{number}" style="left:{left:.3%};top:{top:.3%};width:{right - left:.3%};'
            f'height:{bottom - top:.3%};--box:{_css(color)};--ink:{_css(text_color(color))}"><span>{name}</span></div>'
        )
    return mask_layer(found) + "".join(elements)


def mask_layer(found: Detections) -> str:
    """Return the masks as one transparent picture in the colours of their boxes, empty without masks."""
    if found.masks is None or not len(found):
        return ""
    step = -(-max(found.size) // LONGEST_SIDE_SHOWN)
    masks = found.masks[:, ::step, ::step]
    layer = np.zeros((*masks.shape[1:], 4), dtype=np.uint8)
    # Best last, on top.
    for mask, name in list(zip(masks, found.text_labels, strict=True))[::-1]:
        layer[mask] = (*_color(found, name), _MASK_OPACITY)
    buffer = io.BytesIO()
    Image.fromarray(layer, "RGBA").save(buffer, "PNG")
    return f'<img class="gd-masks" alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def presence(outputs: Outputs, found: Detections, settings: Settings) -> str:
    """Return a table with the highest score of every label that was asked for, found or not.

    Args:
        outputs: The model's outputs.
        found: Detections that are shown.
        settings: The thresholds.

    Returns:
        HTML of the table.
    """
    scores = found.presence or {}
    names = found.text_labels
    rows = []
    for name in found.names:
        number, score = names.count(name), scores.get(name, 0.0)
        shown = f"{number} box{'es' * (number != 1)}" if number else _why_missing(outputs, name, score, settings)
        rows.append(
            f'<tr class="{"gd-found" if number else "gd-missing"}"><td>{_dot(found, name)}{html.escape(name)}</td>'
            f'<td><span class="gd-bar" style="--score:{score:.0%};--box:{_css(_color(found, name))}"></span>'
            f"{score:.2f}</td><td>{shown}</td></tr>"
        )
    kind = "Label" if found.caption is None else "Phrase"
    return (
        f'<table class="gd-table gd-presence"><thead><tr><th scope="col">{kind}</th>'
        '<th scope="col">Highest score</th><th scope="col">Found</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def table(found: Detections) -> str:
    """Return a table with label, score and box of every detection.

    Args:
        found: Detections to show, best first.

    Returns:
        HTML of the table.
    """
    rows = "".join(
        f"<tr><td>{_dot(found, each.text_label)}{html.escape(each.text_label)}</td>"
        f"<td>{each.score:.3f}</td><td>{' '.join(str(round(side)) for side in each.box)}</td></tr>"
        for each in found
    )
    rows = rows or '<tr><td colspan="3">nothing</td></tr>'
    return (
        '<table class="gd-table"><caption>Best first; boxes are left, top, right and bottom in pixels</caption>'
        '<thead><tr><th scope="col">Label</th><th scope="col">Score</th><th scope="col">Box</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def caption(found: Detections, phrases: Sequence[tuple[int, int]]) -> str:
    """Return a caption whose phrases are marked in the colours of their boxes.

    Args:
        found: Detections with the caption.
        phrases: (start, end) characters of each phrase.

    Returns:
        HTML of a paragraph.
    """
    text, end = found.caption or "", 0
    pieces = []
    for start, stop in sorted(phrases):
        if start < end:
            continue
        color = _color(found, text[start:stop])
        pieces += [
            html.escape(text[end:start]),
            f'<mark style="background:{_css(color)};color:{_css(text_color(color))}">{html.escape(text[start:stop])}'
            "</mark>",
        ]
        end = stop
    return f'<p class="gd-caption">{"".join(pieces)}{html.escape(text[end:])}</p>'


def status(outputs: Outputs, found: Detections, settings: Settings) -> str:
    """Return the number of detections, the model's run time and device, and advice if nothing was found.

    Args:
        outputs: The model's outputs.
        found: Detections that are shown.
        settings: The thresholds.

    Returns:
        HTML of an element that screen readers announce.
    """
    count = f"<strong>{len(found)} detection{'s' * (len(found) != 1)}</strong>"
    tiles = f" in the picture and {len(outputs.tiles)} tiles" if outputs.tiles else ""
    ran = (
        f"{1000 * outputs.seconds:.0f} ms with {html.escape(outputs.model)} on {html.escape(outputs.device)}, "
        f"deformable attention in {html.escape(outputs.backend)}"
        + ("" if outputs.masks is None else f", masks by {html.escape(outputs.masks.name)}")
    )
    parts = [f"<p>{count}{tiles} · {ran}</p>"]
    if found.caption is not None:
        parts.insert(0, caption(found, outputs.query.phrases))
    if len(found) == 0:
        parts.append(f"<p>{html.escape(advice(outputs, settings))}</p>")
    parts.append(remarks(outputs))
    return f'<div class="gd-status" role="status">{"".join(parts)}</div>'


def remarks(outputs: Outputs) -> str:
    """Return what is odd about the labels as HTML paragraphs, empty if there is nothing."""
    return "".join(f"<p>{html.escape(remark)}</p>" for remark in outputs.remarks)


def advice(outputs: Outputs, settings: Settings) -> str:
    """Return why a result is empty: the best score, and which setting would show it."""
    best = outputs.best()
    if best is None:
        if outputs.query.negatives:
            return "Every candidate fits a negative label better; remove some of them, or try other words."
        return "The model has no candidate for these labels; try other words."
    label = best.text_label
    text = f"The best candidate is {label} with a score of {best.score:.3f}"
    if label in settings.hidden:
        return f"{text}, and that label is switched off; switch it on below the picture."
    own = outputs.own_threshold(label)
    if own is not None and best.score <= own:
        return f"{text}, and the vocabulary file asks for more than {own:.3f} for that label."
    # Rounded down, so that the advised threshold shows the box.
    lower = int(best.score * 100) / 100
    if best.score <= settings.threshold:
        return f"{text}: lower the threshold from {settings.threshold:.2f} to {lower:.2f} or below to see it."
    return f"{text}: lower the word threshold from {settings.text_threshold:.2f} to see it."


def report(outputs: Outputs, found: Detections, settings: Settings) -> dict[str, Any]:
    """Return the result as data, for the JSON download and the API.

    Args:
        outputs: The model's outputs.
        found: Detections that passed the thresholds.
        settings: The thresholds.

    Returns:
        The settings; "width" and "height" in pixels; "presence", the highest score of each label, found or not;
        "detections" with xyxy boxes in pixels, and for a caption with the phrase's characters in "spans"; and
        "remarks" if there is something odd about the labels.
    """
    data = {
        "image": outputs.name,
        "width": outputs.size[0],
        "height": outputs.size[1],
        "model": outputs.model,
        "labels": list(outputs.labels),
        "negative_labels": list(outputs.query.negatives),
        "threshold": settings.threshold,
        "text_threshold": settings.text_threshold,
        "nms": settings.nms if settings.nms < 1 else None,
        "box_format": "xyxy",
        "seconds": round(outputs.seconds, 4),
        "device": outputs.device,
        "backend": outputs.backend,
        "presence": dict(found.presence or {}),
        "detections": rows(found),
    }
    if found.caption is not None:
        data["caption"] = found.caption
    if outputs.masks is not None:
        data |= {"masks": outputs.masks.name, "tighten": outputs.masks.tighten}
    if outputs.tiles:
        data |= {"tiles": outputs.query.tiles, "tiles_searched": len(outputs.tiles)}
    return {**data, "remarks": list(outputs.remarks)} if outputs.remarks else data


def rows(found: Detections) -> list[dict[str, Any]]:
    """Return each detection as data, with the fields that `gdino detect` writes; masks are COCO's run lengths."""
    data: list[dict[str, Any]] = [
        {"label": each.text_label, "label_index": each.label, "score": each.score, "box": list(each.box)}
        for each in found
    ]
    for row, spans in zip(data, found.spans or ()):  # noqa: B905  there are no spans without a caption
        row["spans"] = [list(span) for span in spans]
    for row, mask in zip(data, encode_masks(found.masks) or ()):  # noqa: B905  there are none without a segmenter
        row["mask"] = mask
    for row, scores in zip(data, found.token_scores or ()):  # noqa: B905  only of a caption that is one prompt
        row["token_scores"] = [list(pair) for pair in scores]
    return data


def jpeg(image: Image.Image) -> bytes:
    """Encode the picture as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def to_text(data: dict[str, Any]) -> str:
    """Format data as JSON for files."""
    return json.dumps(data, ensure_ascii=False, indent=2) + "\n"


def _why_missing(outputs: Outputs, name: str, score: float, settings: Settings) -> str:
    """Return why a label has no box."""
    if name in settings.hidden:
        return "hidden"
    own = outputs.own_threshold(name)
    if score <= (settings.threshold if own is None else own):
        return "not found"
    return "another label fits better" if settings.text_threshold <= score else "below the word threshold"


def _dot(found: Detections, name: str) -> str:
    return f'<i class="gd-dot" style="background:{_css(_color(found, name))}"></i>'


def _color(found: Detections, name: str) -> tuple[int, int, int]:
    """Return the colour of a label: its own, or the one that its text always gets."""
    own = found.colors.get(name)
    return label_color(name) if own is None else ImageColor.getrgb(own)[:3]


def _css(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
