"""The content of a COCO file as it lies on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..model.printable import printable
from ..model.text_prompt import shorten
from .content import Content
from .faults import Findings
from .rows import parse_integer, parse_number, parse_text, read_json

# Each list of a COCO file, and the kind of fault of an entry that is no dict.
_LISTS = {"images": "broken entries", "annotations": "broken boxes", "categories": "broken entries"}


def load_coco(annotations: str | Path, findings: Findings) -> Content:
    """Load a COCO file; the entries of its three lists are dicts, whose content is not checked.

    Args:
        annotations: The COCO json file.
        findings: Receives the entries that are no dicts, which are left out.

    Returns:
        The content.

    Raises:
        ValueError: The file is not a COCO detection file.
    """
    content = read_json(annotations, "COCO json")
    if not isinstance(content, dict):
        raise ValueError(
            f"{printable(annotations)} is not a COCO detection file: it holds a {type(content).__name__}, not a dict."
        )
    missing = [name for name in _LISTS if name not in content]
    if missing:
        raise ValueError(f"{printable(annotations)} is not a COCO detection file: it has no {', '.join(missing)}.")
    for name, kind in _LISTS.items():
        entries = content[name]
        if not isinstance(entries, list) or (entries and not any(isinstance(entry, dict) for entry in entries)):
            raise ValueError(
                f"{printable(annotations)} is not a COCO detection file: its {name} are not a list of dicts."
            )
        for place, entry in enumerate(entries):
            if not isinstance(entry, dict):
                findings.add(kind, f"{name}[{place}] is {shorten(entry)}, not a dict")
        content[name] = [entry for entry in entries if isinstance(entry, dict)]
    return Content(*(content[name] for name in _LISTS))


def id_key(value: Any) -> int | str:
    """Return the form in which ids are compared: 3, 3.0 and "3" are the same.

    Args:
        value: Id as in the file.

    Returns:
        An integer, or text for anything else.
    """
    try:
        return read_id(value)
    except ValueError:
        return f"no id: {shorten(value)}"


def is_id(value: Any) -> bool:
    """Return whether a value from a file is an id; see `read_id`."""
    try:
        read_id(value)
    except ValueError:
        return False
    return True


def read_id(value: Any) -> int | str:
    """Check that a value from a file is an id, an integer or text.

    Args:
        value: The value.

    Returns:
        The integer, also if it is written as text without leading zeros; otherwise the text.

    Raises:
        ValueError: The value is neither an integer nor text.
    """
    if not isinstance(value, str):
        if not isinstance(value, (int, float)):
            raise ValueError(f"its id is {shorten(value)}, neither a whole number nor text")
        return parse_integer(value, "its id", -(2**63))
    number = parse_number(value)
    return (
        number
        if isinstance(number, int) and str(number) == value and abs(number) < 2**63
        else parse_text(value, "its id")
    )


def is_marked(value: Any) -> tuple[bool, bool]:
    """Return whether a flag of a file is set, and whether it is written as flags are.

    Args:
        value: The flag; 1, "1", true and "true" are set and written as usual, and so is "yes", which is not usual.
            Anything that is neither these nor their opposites is not set.
    """
    number = parse_number(value)
    word = number.strip().lower() if isinstance(number, str) else number
    usual = word in (None, "", "true", "false") or (isinstance(word, (int, float)) and word in (0, 1))
    return isinstance(word, (int, float, str)) and word in (1, "true", "yes", "y", "t"), usual
