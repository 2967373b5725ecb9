"""Folders of pictures with metadata.jsonl, as `datasets` calls an imagefolder: a line for each picture with objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..error_text import reason
from ..model.printable import printable
from ..model.text_prompt import shorten
from .box_formats import decide_numbers
from .content import BoxForm
from .faults import OUTSIDE, Report
from .image_paths import ImagePaths, OutsideError
from .odvg_content import read_label_map
from .picture_objects import ObjectColumns, fields_of, find_columns, kinds_of, row_marks
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
                fields[name] = fields_of(value) or fields.get(name, [])
                kinds |= kinds_of(value)
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


def is_metadata(content: Mapping[str, Any]) -> bool:
    """Return whether the first line of a json lines file is that of an imagefolder with boxes."""
    if not isinstance(content.get(_FILE_NAME), str):
        return False
    try:
        find_columns({name: fields_of(value) for name, value in content.items()}, shorten(_FILE_NAME))
    except ValueError:
        return False
    return True
