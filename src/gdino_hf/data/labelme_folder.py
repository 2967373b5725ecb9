"""LabelMe annotations: a JSON file for each picture, with rectangles, polygons and circles in pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..model.text_prompt import shorten
from .faults import Findings, Report
from .picture_index import PictureIndex
from .picture_sets import Mark, PictureEntry, PictureSet, files_below, files_of, read_mapping, relative_name
from .rows import parse_number, read_json

# Folders that hold the files of a data set whose pictures lie elsewhere in it.
_INSIDE = ("json", "jsons", "annotations", "Annotations", "labels")
# Files looked at before a folder is taken for none of LabelMe's.
_MOST_TRIED = 20
# Shapes that show where something is but not how far it reaches.
_WITHOUT_EXTENT = ("point", "points", "line", "linestrip")


class LabelMeFolder(PictureSet):
    """A LabelMe data set; `base` is the folder of its JSON files or the one above."""

    form = "labelme"
    title = "a LabelMe folder"

    @cached_property
    def _keys(self) -> list[Path]:
        return labelme_files(Path(self.base))

    def keys(self) -> Sequence[Path]:
        return self._keys

    @cached_property
    def index(self) -> PictureIndex:
        """The pictures that files can mean."""
        root = Path(self.base)
        folders = [root, root / "images", *dict.fromkeys(path.parent for path in self._keys)]
        return PictureIndex(folders if self.images is None else [self.images], root, self.options)

    def entry(self, key: Path, report: Report) -> PictureEntry | None:
        where = relative_name(key, self.base)
        content = read_mapping(read_json(key, "LabelMe json"), "it")
        stated = content.get("imagePath")
        picture = self.index.find(stated if isinstance(stated, str) else None, key, report, where)
        if picture is None:
            return None
        size = (content.get("imageWidth"), content.get("imageHeight"))
        marks = labelme_marks(content, where, report)
        return PictureEntry(relative_name(picture, self.base), picture, marks, size if all(size) else None)

    def finish(self, findings: Findings) -> None:
        self.index.report_unused(self.base, findings)


def labelme_files(folder: Path) -> list[Path]:
    """Return the LabelMe files of a folder, or of a folder of annotations in it, with those of its sub-folders.

    LabelMe opens a folder with its sub-folders, and writes each file beside its picture.
    """
    for place in (folder, *(folder / name for name in _INSIDE)):
        if any(map(is_labelme_file, files_of(place, ".json"))):
            return [path for path in files_below(place, ".json") if is_labelme_file(path)]
    return []


def has_labelme_files(folder: Path) -> bool:
    """Return whether some of the first JSON files of a folder, or of a folder of annotations in it, are LabelMe's."""
    places = (folder, *(folder / name for name in _INSIDE))
    return any(is_labelme_file(path) for place in places for path in files_of(place, ".json")[:_MOST_TRIED])


def is_labelme_file(path: Path) -> bool:
    """Return whether a JSON file is one of LabelMe, by its beginning and its end: pictures inside it may be large."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            both = head + file.read()
    except OSError:
        return False
    return b'"shapes"' in both and (b'"imagePath"' in both or b'"imageData"' in both)


def labelme_marks(content: Mapping[str, Any], where: str, report: Report) -> list[Mark]:
    """Return the boxes of a LabelMe file as x1, y1, x2, y2 in pixels; polygons keep their corners.

    Polygons of one label and one group are parts of one object, as in LabelMe's own converters.

    Args:
        content: The file's content.
        where: Name of the file, for messages.
        report: Function that faults of single shapes are passed to.

    Raises:
        ValueError: The file has no list of shapes.
    """
    shapes = content.get("shapes")
    if not isinstance(shapes, list):
        raise ValueError(f"its shapes are {shorten(shapes)}, not a list")
    marks: list[Mark] = []
    groups: dict[tuple[str, str], Mark] = {}
    for number, shape in enumerate(shapes, 1):
        place = f"{where} shape {number}"
        try:
            shape = read_mapping(shape, "it")
            kind = str(shape.get("shape_type") or "polygon")
            if kind in _WITHOUT_EXTENT:
                report("shapes without extent", f"{place}: {shorten(kind)}")
                continue
            points = _points(shape.get("points"))
        except ValueError as error:
            report("broken boxes", f"{place}: {error}")
            continue
        mark = _mark(shape.get("label"), kind, points, place)
        if mark.polygons is not None and shape.get("group_id") is not None:
            first = groups.setdefault((str(mark.label), str(shape["group_id"])), mark)
            if first is not mark:
                first.polygons.extend(mark.polygons)
                continue
        marks.append(mark)
    return marks


def _mark(label: Any, kind: str, points: list[tuple[float, float]], place: str) -> Mark:
    if kind == "circle" and len(points) == 2:
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        return Mark(label, [x - radius, y - radius, x + radius, y + radius], place)
    if len(points) > 2:
        return Mark(label, None, place, [[side for point in points for side in point]])
    xs, ys = zip(*points, strict=True)
    return Mark(label, [min(xs), min(ys), max(xs), max(ys)], place)


def _points(value: Any) -> list[tuple[float, float]]:
    points = []
    for point in value if isinstance(value, list) else []:
        numbers = [parse_number(side) for side in point] if isinstance(point, list) else []
        if len(numbers) != 2 or not all(_is_finite(side) for side in numbers):
            raise ValueError(f"its point {shorten(point)} is not two finite numbers")
        points.append((float(numbers[0]), float(numbers[1])))
    if len(points) < 2:
        raise ValueError(f"it has {len(points)} points, of which a box needs two")
    return points


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
