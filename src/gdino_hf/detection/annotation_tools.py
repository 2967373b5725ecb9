"""Tools that read JSON: CreateML, ODVG, Label Studio and FiftyOne, as the dicts that they document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element, SubElement, tostring

import numpy as np

from ..data.createml_file import CENTER_SIDES
from .exchange_values import (
    box_table,
    center_sizes,
    corner_sizes,
    decimal,
    entry,
    from_center_sizes,
    from_corner_sizes,
    logger,
    picture_name,
    rounded,
    say_left_out,
    values_of,
    whole_numbers,
)
from .xml_exchange import xml_text

_RECTANGLES = "rectanglelabels"


def createml_entry(found: Any, file_name: str | None) -> dict[str, Any]:
    """Return `Detections` as a picture's entry in CreateML's list; see `Detections.to_createml`."""
    say_left_out(found, "CreateML", "masks", "track_ids", "spans")
    centers = rounded(center_sizes(found.boxes), from_center_sizes, found.boxes)
    boxes = [
        {"label": label, "coordinates": dict(zip(CENTER_SIDES, box, strict=True))}
        for label, box in zip(found.text_labels, centers.tolist(), strict=True)
    ]
    return {"image": picture_name(found, file_name), "annotations": boxes}


def read_createml(
    content: Mapping[str, Any], size: tuple[int, int], names: Sequence[str] | None, source: str | None
) -> dict[str, Any]:
    """Return the arguments of `Detections` for a picture's entry in CreateML's list.

    Raises:
        ValueError: It is not one.
    """
    boxes, texts = [], []
    for row in entry(content, "annotations", "The CreateML entry"):
        sides = entry(row, "coordinates", "The CreateML annotation")
        boxes.append([entry(sides, side, "The CreateML box") for side in CENTER_SIDES])
        texts.append(entry(row, "label", "The CreateML annotation"))
    given = source if source is not None else content.get("image")
    return values_of(from_center_sizes(box_table(boxes)), texts, size, names, source=given)


def odvg_line(found: Any, file_name: str | None) -> dict[str, Any]:
    """Return `Detections` as a picture's line in an ODVG detection file: boxes are xyxy in pixels."""
    say_left_out(found, "ODVG", "masks", "track_ids", "spans")
    width, height = found.size
    instances = [
        {"bbox": box, "label": label, "category": text}
        for box, label, text in zip(
            decimal(found.boxes).tolist(), found.labels.tolist(), found.text_labels, strict=True
        )
    ]
    name = picture_name(found, file_name)
    return {"filename": name, "height": height, "width": width, "detection": {"instances": instances}}


def label_studio_prediction(found: Any, from_name: str, to_name: str, model_version: str | None) -> dict[str, Any]:
    """Return `Detections` as a prediction of Label Studio; see `Detections.to_label_studio`."""
    say_left_out(found, "Label Studio's rectangles", "masks", "track_ids", "spans")
    width, height = found.size
    percentages = _relative(found, 100.0, 4)
    scores = decimal(found.scores).tolist()
    result = [
        {
            "id": f"box{place}",
            "from_name": from_name,
            "to_name": to_name,
            "type": _RECTANGLES,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {**dict(zip(CENTER_SIDES, box, strict=True)), "rotation": 0, _RECTANGLES: [label]},
            "score": score,
        }
        for place, (label, box, score) in enumerate(zip(found.text_labels, percentages.tolist(), scores, strict=True))
    ]
    mean = round(sum(scores) / len(scores), 6) if scores else 0.0
    prediction: dict[str, Any] = {"score": mean, "result": result}
    return prediction if model_version is None else {"model_version": model_version, **prediction}


def read_label_studio(
    content: Mapping[str, Any], names: Sequence[str] | None, size: tuple[int, int] | None, source: str | None
) -> dict[str, Any]:
    """Return the arguments of `Detections` for a prediction or an annotation of Label Studio.

    Raises:
        ValueError: It is neither, a rectangle is turned or without a label, or there is no size.
    """
    regions = list(entry(content, "result", "The Label Studio prediction"))
    rectangles = [region for region in regions if entry(region, "type", "The Label Studio region") == _RECTANGLES]
    if len(rectangles) != len(regions):
        logger.warning(
            "%d of Label Studio's regions are not rectangles and are left out.", len(regions) - len(rectangles)
        )
    boxes, texts = [], []
    for region in rectangles:
        value = entry(region, "value", "The Label Studio region")
        if value.get("rotation"):
            raise ValueError(
                f"A rectangle is turned by {value['rotation']} degrees; boxes are upright, so leave it out."
            )
        labels = entry(value, _RECTANGLES, "The Label Studio rectangle")
        if not labels:
            raise ValueError("A rectangle of Label Studio has no label; leave it out.")
        size = size or (region["original_width"], region["original_height"])
        boxes.append([entry(value, side, "The Label Studio rectangle") for side in CENTER_SIDES])
        texts.append(labels[0])
    scores = [region.get("score") for region in rectangles]
    table = from_corner_sizes(box_table(boxes) * _scale(size or (1, 1), 100.0))
    return values_of(table, texts, size, names, scores, source=source)


def label_studio_config(names: Sequence[str], from_name: str = "label", to_name: str = "image") -> str:
    """Return the labeling configuration of a Label Studio project that shows the boxes.

    Args:
        names: All labels.
        from_name: Name of the control, as in `Detections.to_label_studio`.
        to_name: Name of the picture, as in `Detections.to_label_studio`.
    """
    view = Element("View")
    SubElement(view, "Image", {"name": to_name, "value": "$image"})
    control = SubElement(view, "RectangleLabels", {"name": from_name, "toName": to_name})
    for name in names:
        SubElement(control, "Label", {"value": xml_text(name)})
    return tostring(view, encoding="unicode") + "\n"


def fiftyone_rows(found: Any) -> list[dict[str, Any]]:
    """Return `Detections` as arguments of `fiftyone.Detection`; see `Detections.to_fiftyone`."""
    say_left_out(found, "FiftyOne's rows", "masks", "spans")
    columns = zip(found.text_labels, _relative(found, 1.0, 6).tolist(), decimal(found.scores).tolist(), strict=True)
    rows = [{"label": label, "bounding_box": box, "confidence": score} for label, box, score in columns]
    if found.track_ids is not None:
        for row, track in zip(rows, found.track_ids.tolist(), strict=True):
            row["index"] = track
    return rows


def read_fiftyone(
    rows: Sequence[Mapping[str, Any]], size: tuple[int, int], names: Sequence[str] | None, source: str | None
) -> dict[str, Any]:
    """Return the arguments of `Detections` for the fields of FiftyOne detections.

    Raises:
        ValueError: A row lacks its label or its box.
    """
    what = "The FiftyOne detection"
    table = box_table([entry(row, "bounding_box", what) for row in rows]) * _scale(size, 1.0)
    texts = [entry(row, "label", what) for row in rows]
    scores = [row.get("confidence") for row in rows]
    tracks = whole_numbers(row.get("index") for row in rows)
    return values_of(from_corner_sizes(table), texts, size, names, scores, source=source, track_ids=tracks)


def _scale(size: tuple[int, int], whole: float) -> np.ndarray:
    """Return pixels per unit of x, y, width and height if the picture measures `whole` by `whole`."""
    return np.array(tuple(size) * 2, dtype=np.float64) / whole


def _relative(found: Any, whole: float, decimals: int) -> np.ndarray:
    """Return (N, 4) x, y, width, height of boxes in a picture that measures `whole` by `whole`."""
    scale = _scale(found.size, whole)
    values = corner_sizes(found.boxes) / scale
    return rounded(values, lambda numbers: from_corner_sizes(numbers * scale), found.boxes, decimals)
