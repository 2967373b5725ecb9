"""Rows with `objects`: boxes and names of one picture, in the forms that the Hub's data sets and tar files have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.printable import printable
from ..model.text_prompt import shorten
from .faults import Report
from .picture_sets import Mark

_OBJECTS = ("objects", "annotations", "object", "instances")
_BOXES = ("bbox", "bboxes", "boxes", "box")
_LABELS = (
    "category",
    "categories",
    "label",
    "labels",
    "category_name",
    "class_name",
    "class",
    "name",
    "names",
    "classes",
    "category_id",
    "class_id",
)
_CROWDS = ("iscrowd", "is_crowd", "crowd")


@dataclass(frozen=True)
class ObjectColumns:
    """Which columns of a row have the boxes and their names.

    Attributes:
        objects: Column with a dict of lists or a list of dicts; None if the lists are columns themselves.
        box: Field with the four numbers.
        label: Field with the name or class number.
        crowd, area: Fields with these; None without them.
    """

    objects: str | None
    box: str
    label: str
    crowd: str | None = None
    area: str | None = None


def find_columns(columns: Mapping[str, Any], place: str, kinds: Mapping[str, Any] | None = None) -> ObjectColumns:
    """Find the boxes and names among the columns of a data set.

    Args:
        columns: Fields of each column that has fields, or an empty list, by the column's name.
        place: Name of the data set, for the error.
        kinds: Kind of each field by its name ("name" for text and named classes), to prefer names to numbers.

    Raises:
        ValueError: There are none.
    """
    for objects in (*(name for name in _OBJECTS if columns.get(name)), None):
        fields = columns if objects is None else columns[objects]
        box = next((name for name in _BOXES if name in fields), None)
        labels = [name for name in _LABELS if name in fields]
        labels.sort(key=lambda name: (kinds or {}).get(name) != "name")
        if box is not None and labels:
            crowd = next((name for name in _CROWDS if name in fields), None)
            return ObjectColumns(objects, box, labels[0], crowd, "area" if "area" in fields else None)
    raise ValueError(
        f"{place} has the columns {printable(', '.join(map(str, columns)))}, of which none is objects with bbox and "
        "category; rename its columns to these."
    )


def row_marks(row: Mapping[str, Any], columns: ObjectColumns, where: str, report: Report) -> list[Mark]:
    """Return the boxes of a row, with the numbers and names as they are.

    Args:
        row: The row.
        columns: From `find_columns`.
        where: Name of the row, for messages.
        report: Function that faults of single boxes are passed to.

    Raises:
        ValueError: There are not as many names as boxes.
    """
    given = row if columns.objects is None else row.get(columns.objects)
    if given is None:
        return []
    if isinstance(given, Mapping):
        items = _from_lists(given, columns)
    elif isinstance(given, Sequence) and not isinstance(given, str):
        items = given
    else:
        raise ValueError(f"its {columns.objects} are {shorten(given)}, neither lists nor a list of dicts")
    marks = []
    for number, item in enumerate(items, 1):
        place = f"{where} object {number}"
        if not isinstance(item, Mapping):
            report("broken boxes", f"{place}: it is {shorten(item)}, not a dict")
            continue
        crowd = item.get(columns.crowd or "")
        area = item.get(columns.area or "")
        box = item.get(columns.box)
        marks.append(Mark(item.get(columns.label), None if box is None else list(box), place, None, crowd or 0, area))
        marks[-1].box = [] if box is None else marks[-1].box
    return marks


def _from_lists(given: Mapping[str, Any], columns: ObjectColumns) -> Iterable[dict[str, Any]]:
    fields = [name for name in (columns.box, columns.label, columns.crowd, columns.area) if name is not None]
    lists: dict[str, Any] = {name: given.get(name) for name in fields}
    lists = {name: [] if values is None else values for name, values in lists.items()}
    boxes, labels = lists[columns.box], lists[columns.label]
    if not all(isinstance(values, Sequence) and not isinstance(values, str) for values in (boxes, labels)):
        raise ValueError(f"its {columns.box} and {columns.label} are not lists")
    if len(boxes) != len(labels):
        raise ValueError(f"it has {len(boxes)} boxes but {len(labels)} names")
    kept = {name: values for name, values in lists.items() if len(values) == len(boxes)}
    return [dict(zip(kept, values, strict=True)) for values in zip(*kept.values(), strict=True)]


def fields_of(value: Any) -> list[str]:
    """Return the fields of a value: of a dict, or of the first dict of a list."""
    if isinstance(value, list):
        value = next((item for item in value if isinstance(item, Mapping)), None)
    return [str(name) for name in value] if isinstance(value, Mapping) else []


def kinds_of(value: Any) -> dict[str, str]:
    """Return the fields of a value whose items are text."""
    items = value if isinstance(value, list) else [value]
    kinds: dict[str, str] = {}
    for item in items:
        for name, inner in item.items() if isinstance(item, Mapping) else ():
            first = inner[0] if isinstance(inner, list) and inner else inner
            if isinstance(first, str):
                kinds[str(name)] = "name"
    return kinds
