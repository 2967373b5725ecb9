"""Folders of pictures with metadata.jsonl, as `datasets` calls an imagefolder: a line for each picture with objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..error_text import reason
from ..model.printable import printable
from ..model.text_prompt import shorten
from .box_formats import ENOUGH, BoxVote
from .content import BoxForm
from .faults import OUTSIDE, Report
from .frames import read_header
from .image_paths import ImagePaths, OutsideError
from .odvg_content import read_label_map
from .picture_objects import ObjectColumns, find_columns, row_marks
from .picture_sets import PictureEntry, PictureSet
from .rows import parse_line, parse_text

METADATA = "metadata.jsonl"
_FILE_NAME = "file_name"


class ImageFolder(PictureSet):
    """An imagefolder; `base` is its metadata.jsonl."""

    form = "imagefolder"
    title = "a folder with metadata.jsonl"

    @cached_property
    def _lines(self) -> list[tuple[int, bytes]]:
        try:
            with open(self.base, "rb") as file:
                return [(number, line) for number, line in enumerate(file, 1) if line.strip()]
        except OSError as error:
            raise ValueError(f"{printable(self.base)} cannot be read ({reason(error)}).") from error

    @cached_property
    def _paths(self) -> ImagePaths:
        # File names are relative to the file itself.
        folder = Path(self.base).parent if self.images is None else self.images
        return ImagePaths(self.base, folder, self.options)

    @cached_property
    def _columns(self) -> ObjectColumns:
        fields: dict[str, Any] = {}
        kinds: dict[str, str] = {}
        for _, line in self._lines[:100]:
            try:
                row = parse_line(line)
            except ValueError:
                # Reading the rows reports this line.
                continue
            for name, value in row.items():
                fields[name] = _fields_of(value) or fields.get(name, [])
                kinds |= _kinds_of(value)
        return find_columns(fields, printable(self.base), kinds)

    def keys(self) -> Sequence[int]:
        return range(len(self._lines))

    def shown(self, key: Any) -> str:
        return f"line {self._lines[key][0]}"

    def names(self) -> dict[Any, str] | None:
        return dict(read_label_map(self.base, None)) or None

    def entry(self, key: int, report: Report) -> PictureEntry | None:
        where = self.shown(key)
        row = parse_line(self._lines[key][1])
        name = parse_text(row.get(_FILE_NAME), "its file_name")
        try:
            picture = self._paths.find(name)
        except OutsideError as error:
            report(OUTSIDE, f"{where}: {error}")
            return None
        size = (row.get("width"), row.get("height"))
        marks = row_marks(row, self._columns, where, report)
        return PictureEntry(name, picture, marks, size if all(size) else None)

    def box_numbers(self) -> tuple[BoxForm, bool]:
        return self._numbers

    @cached_property
    def _numbers(self) -> tuple[BoxForm, bool]:
        return decide_numbers(self, self.options.box_format)


def decide_numbers(reader: PictureSet, option: Any) -> tuple[BoxForm, bool]:
    """Find out what the boxes of a data set's numbers are, and whether they are fractions.

    Args:
        reader: The data set.
        option: The form if it was given, or "auto".

    Raises:
        ValueError: It cannot be decided.
    """
    vote = BoxVote()
    for key in reader.keys():  # noqa: SIM118  a sequence, not a dict
        try:
            entry = reader.entry(key, _ignore)
        except (OSError, ValueError):
            # Reading the rows reports this picture.
            continue
        if entry is None or not entry.marks:
            continue
        size = _size_of(entry)
        for mark in entry.marks:
            vote.add(mark.box, size, mark.area)
        if vote.boxes >= ENOUGH and (option != "auto" or len(vote.possible()) == 1):
            break
    return vote.decide(option, printable(reader.base))


def _size_of(entry: PictureEntry) -> tuple[float, float] | None:
    try:
        if entry.size is not None:
            return float(entry.size[0]), float(entry.size[1])
        (width, height), orientation = read_header(entry.picture)
    except (OSError, TypeError, ValueError):
        return None
    return (height, width) if orientation > 4 else (width, height)


def _ignore(kind: str, example: str) -> None:
    """Leave a fault to the reading of the rows."""


def _fields_of(value: Any) -> list[str]:
    if isinstance(value, list):
        value = next((item for item in value if isinstance(item, Mapping)), None)
    return [str(name) for name in value] if isinstance(value, Mapping) else []


def _kinds_of(value: Any) -> dict[str, str]:
    """Return the fields of a value whose items are text."""
    items = value if isinstance(value, list) else [value]
    kinds: dict[str, str] = {}
    for item in items:
        for name, inner in item.items() if isinstance(item, Mapping) else ():
            first = inner[0] if isinstance(inner, list) and inner else inner
            if isinstance(first, str):
                kinds[str(name)] = "name"
    return kinds


def is_metadata(content: Mapping[str, Any]) -> bool:
    """Return whether the first line of a json lines file is that of an imagefolder with boxes."""
    if not isinstance(content.get(_FILE_NAME), str):
        return False
    try:
        find_columns({name: _fields_of(value) for name, value in content.items()}, shorten(_FILE_NAME))
    except ValueError:
        return False
    return True
