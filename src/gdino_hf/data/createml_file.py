"""CreateML annotations: a JSON list with an entry for each picture, boxes by their center in pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..model.text_prompt import shorten
from .faults import OUTSIDE, Report
from .image_paths import OutsideError
from .list_file import ListFile
from .picture_sets import Mark, PictureEntry, read_mapping
from .rows import parse_text

CENTER_SIDES = ("x", "y", "width", "height")
# The keys of Create ML's documentation, and those of its older examples.
_NAMES, _LISTS = ("image", "imagefilename"), ("annotations", "annotation")


class CreateMLFile(ListFile):
    """A CreateML data set; `base` is its JSON file."""

    form = "createml"
    title = "CreateML json"
    box_form = "cxcywh"

    def entry(self, key: int, report: Report) -> PictureEntry | None:
        row = read_mapping(self.rows[key], "it")
        name = parse_text(next((row[name] for name in _NAMES if name in row), None), "its image")
        try:
            picture = self.paths.find(name)
        except OutsideError as error:
            report(OUTSIDE, f"{self.shown(key)}: {error}")
            return None
        return PictureEntry(name, picture, createml_marks(row, shorten(name), report))


def createml_marks(row: Mapping[str, Any], where: str, report: Report) -> list[Mark]:
    """Return the boxes of an entry of CreateML's list, as center and size in pixels.

    Args:
        row: The entry.
        where: Name of the picture, for messages.
        report: Function that faults of single boxes are passed to.

    Raises:
        ValueError: The entry has no list of annotations.
    """
    annotations = next((row[name] for name in _LISTS if name in row), None)
    if not isinstance(annotations, list):
        raise ValueError(f"its annotations are {shorten(annotations)}, not a list")
    marks = []
    for number, annotation in enumerate(annotations, 1):
        place = f"{where} annotation {number}"
        try:
            sides = read_mapping(read_mapping(annotation, "it").get("coordinates"), "its coordinates")
        except ValueError as error:
            report("broken boxes", f"{place}: {error}")
            continue
        marks.append(Mark(annotation.get("label"), [sides.get(side) for side in CENTER_SIDES], place))
    return marks


def is_createml(content: Any) -> bool:
    """Return whether the first entry of a JSON list is that of a CreateML file."""
    if not isinstance(content, Mapping) or not any(name in content for name in _NAMES):
        return False
    annotations = next((content[name] for name in _LISTS if name in content), None)
    if not isinstance(annotations, list):
        return False
    return all(isinstance(item, Mapping) and "coordinates" in item for item in annotations[:1])
