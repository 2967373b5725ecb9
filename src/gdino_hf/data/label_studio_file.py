"""Exports of Label Studio (JSON): a list with an entry for each task, regions in percent of the picture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ..model.text_prompt import shorten
from .faults import OUTSIDE, Findings, Report
from .image_paths import OutsideError
from .list_file import ListFile
from .picture_sets import Mark, PictureEntry, read_mapping
from .rows import is_file, parse_number

_SIDES = ("x", "y", "width", "height")
# What Label Studio puts before the name of a file that was uploaded.
_UPLOADED = re.compile(r"[0-9a-f]{8}-(?=.)")
_LABELS = "labels"
_SHAPES = ("rectanglelabels", "ellipselabels", "polygonlabels")


class LabelStudioFile(ListFile):
    """An export of Label Studio; `base` is its JSON file. If a task has several annotations, the last one counts."""

    form = "labelstudio"
    title = "Label Studio json"
    entry_name = "task"
    box_form = "xywh"
    is_relative = True

    def entry(self, key: int, report: Report) -> PictureEntry | None:
        task = read_mapping(self.rows[key], "it")
        annotation = _annotation(task)
        if annotation is None:
            report("tasks without annotations", self.shown(key))
            return None
        names = _names(_address(read_mapping(task.get("data"), "its data")))
        try:
            found = [self.paths.find(name) for name in names]
        except OutsideError as error:
            report(OUTSIDE, f"{self.shown(key)}: {error}")
            return None
        picture = next((path for path in found if is_file(path)), found[0])
        return PictureEntry(names[0], picture, label_studio_marks(annotation, self.shown(key), report))

    def finish(self, findings: Findings) -> None:
        if all(_annotation(task) is None for task in self.rows if isinstance(task, Mapping)):
            findings.add("no usable entries", "no task was annotated")


def label_studio_marks(annotation: Mapping[str, Any], where: str, report: Report) -> list[Mark]:
    """Return the boxes of an annotation, as corner and size in fractions of the picture.

    A region with several labels gives a box for each. Turned rectangles and polygons keep their corners; relations,
    choices and texts are passed over.

    Args:
        annotation: The annotation, with a list `result`.
        where: Name of the task, for messages.
        report: Function that faults of single regions are passed to.
    """
    marks: list[Mark] = []
    for number, region in enumerate(annotation["result"], 1):
        place = f"{where} region {number}"
        try:
            kind = str(read_mapping(region, "it").get("type"))
            if not kind.endswith(_LABELS):
                continue
            value = read_mapping(region.get("value"), "its value")
            labels = value.get(kind)
            if not isinstance(labels, list) or not labels:
                raise ValueError("it has no label")
            marks.extend(_mark(kind, value, region, label, place) for label in labels)
        except ValueError as error:
            report("broken boxes", f"{place}: {error}")
    return marks


def _mark(kind: str, value: Mapping[str, Any], region: Mapping[str, Any], label: Any, place: str) -> Mark:
    if kind not in _SHAPES:
        raise ValueError(f"{shorten(kind)} have no box")
    if kind == "polygonlabels":
        points = value.get("points")
        if not isinstance(points, list) or len(points) < 3:
            raise ValueError(f"its points are {shorten(points)}")
        return Mark(label, None, place, [[_fraction(side) for point in points for side in point]])
    if kind == "ellipselabels":
        x, y, width, height = (_fraction(value.get(name)) for name in ("x", "y", "radiusX", "radiusY"))
        return Mark(label, [x - width, y - height, 2 * width, 2 * height], place)
    box = [_fraction(value.get(side)) for side in _SIDES]
    turn = math.radians(float(value.get("rotation") or 0))
    if turn == 0:
        return Mark(label, box, place)
    # Rectangles are turned about their first corner, in pixels.
    width, height = (_size(region.get(name)) for name in ("original_width", "original_height"))
    corners = [(0.0, 0.0), (box[2], 0.0), (box[2], box[3]), (0.0, box[3])]
    turned = [
        (
            box[0] + (x * width * math.cos(turn) - y * height * math.sin(turn)) / width,
            box[1] + (x * width * math.sin(turn) + y * height * math.cos(turn)) / height,
        )
        for x, y in corners
    ]
    return Mark(label, None, place, [[side for corner in turned for side in corner]])


def _fraction(value: Any) -> float:
    number = parse_number(value)
    if not isinstance(number, (int, float)) or isinstance(number, bool) or not math.isfinite(number):
        raise ValueError(f"{shorten(value)} is no number of percent")
    return number / 100


def _size(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError("it is turned, and its picture's size is missing")
    return float(value)


def _annotation(task: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return a task's last annotation that was not cancelled; None without one."""
    given = task.get("annotations")
    there = [
        each
        for each in (given if isinstance(given, list) else [])
        if isinstance(each, Mapping) and isinstance(each.get("result"), list) and not each.get("was_cancelled")
    ]
    return there[-1] if there else None


def _address(data: Mapping[str, Any]) -> str:
    """Return the address of a task's picture: its data's "image", or the first text.

    Raises:
        ValueError: There is none.
    """
    address = data.get("image") or next((value for value in data.values() if isinstance(value, str)), None)
    if not isinstance(address, str) or not address:
        raise ValueError(f"its data {shorten(dict(data))} names no picture")
    return address


def _names(address: str) -> list[str]:
    """Return the paths by which a picture's file is looked for, the likeliest first."""
    parts = urlsplit(address)
    local = parse_qs(parts.query).get("d")
    path = local[0] if local else unquote(parts.path) if parts.scheme or address.startswith("/data/") else address
    path = path.removeprefix("/data/upload/").lstrip("/")
    last = PurePosixPath(path).name
    return list(dict.fromkeys(name for name in (path, last, _UPLOADED.sub("", last, count=1)) if name))


def is_label_studio(content: Any) -> bool:
    """Return whether the first entry of a JSON list is a task of Label Studio's export."""
    if not isinstance(content, Mapping) or not isinstance(content.get("data"), Mapping):
        return False
    annotations = content.get("annotations")
    return isinstance(annotations, list) and all(
        isinstance(each, Mapping) and "result" in each for each in annotations[:1]
    )
