"""Names that an image is known not to contain, from the fields of COCO and LVIS images and of ODVG lines.

In a data set that was put together from several, each image is annotated for the names of its own set only; any other
name may be in the picture without a box. A field "neg_names" with a list of names, or LVIS' "neg_category_ids", says
which names are absent; an empty list says that none is sure to be.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..model.text_prompt import name_key, shorten
from .coco_content import id_key
from .faults import Report
from .rows import parse_text

NAMES, IDS = "neg_names", "neg_category_ids"
# Fields that other tools may call so.
_ALIKE = re.compile(
    r"(neg|negs|negative|negatives|absent)([_ -]?(name|label|class|categor|text|phrase|prompt|caption|noun|id)\w*)*",
    re.IGNORECASE,
)


def has_absent_names(entry: Mapping[str, Any]) -> bool:
    """Return whether an image's entry says which names are absent from it.

    Args:
        entry: Entry of a COCO or LVIS file's "images", or an ODVG line.
    """
    return any(entry.get(field) is not None for field in (NAMES, IDS))


def absent_names(entry: Mapping[str, Any], names: Mapping[Any, str], where: str, report: Report) -> list[str]:
    """Return the names that an image is known not to contain.

    Args:
        entry: Entry of a COCO or LVIS file's "images", or an ODVG line, with such a field.
        names: Name by category id or label number. Ids that are not among them, as in a subset of LVIS, are left out.
        where: Name of the image, for faults.
        report: Function that faults are passed to.

    Returns:
        The names, each once.
    """
    found: dict[str, str] = {}
    for field in (NAMES, IDS):
        values = entry.get(field)
        if values is None:
            continue
        if not isinstance(values, list):
            report("broken absent names", f"{where}: {field} is {shorten(values)}")
            continue
        for value in values:
            if field == IDS:
                name = names.get(id_key(value), "")
            else:
                try:
                    name = parse_text(value, field)
                except ValueError as error:
                    report("broken absent names", f"{where}: {error}")
                    continue
            if name:
                found.setdefault(name_key(name), name)
    return list(found.values())


def check_absent_names(
    absent: Sequence[str], present: Iterable[str], classes: Collection[str] | None, where: str, report: Report
) -> list[str]:
    """Report absent names that contradict the boxes or the list of classes.

    Args:
        absent: Absent names of an image.
        present: Names of its boxes.
        classes: All classes of the file, in the form of `name_key`; None if they are not known.
        where: Name of the image, for faults.
        report: Function that faults are passed to.

    Returns:
        The absent names without those that have a box.
    """
    here = {name_key(name) for name in present}
    kept = []
    for name in absent:
        if name_key(name) in here:
            report("contradicting absent names", f"{where}: {shorten(name)}")
            continue
        if classes is not None and name_key(name) not in classes:
            report("absent names without class", f"{where}: {shorten(name)}")
        kept.append(name)
    return kept


def report_unread(entry: Mapping[str, Any], where: str, report: Report, read: Sequence[str] = (NAMES, IDS)) -> None:
    """Report fields that are called like those of absent names, but that no reader reads.

    Args:
        entry: Entry of the image, or a part of it.
        where: Name of the image, for faults.
        report: Function that faults are passed to.
        read: Fields that are read.
    """
    for field in entry:
        if isinstance(field, str) and field not in read and _ALIKE.fullmatch(field) and entry[field]:
            report("unread absent names", f"{where}: {shorten(field)}")
