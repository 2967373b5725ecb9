"""Data sets as sources: the pictures of all their splits, and a line that says which form was recognized."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data.faults import OUTSIDE, Findings, counted
from ..data.object_tables import ObjectTable
from ..data.picture_sets import picture_files
from ..data.places import split_place
from ..data.set_pictures import RecognizedSet
from ..data.stored_pictures import Picture, StoredPicture, TarPicture
from ..detection.exchange_values import kept_library
from ..model.printable import printable
from .source_items import Key, SeenSources, SourceItem

_NEED = "Data sets of Hugging Face need"


def set_items(
    data_set: RecognizedSet, argument: str, seen: SeenSources, exclude: Path | None, remarks: list[str]
) -> Iterator[tuple[Key, SourceItem]]:
    """List the pictures of a data set.

    Args:
        data_set: The data set.
        argument: What the user named.
        seen: The pictures that were listed and taken, this data set's as soon as they are yielded.
        exclude: Folder of results, whose pictures do not count.
        remarks: Receives a line that says which form the data set has and how many pictures of its folder it does not
            list, and lines for what cannot be used of it.

    Raises:
        ImportError: datasets is not installed.
        ValueError: The data set cannot be read.
    """
    if data_set.form == ObjectTable.form:
        kept_library("datasets", _NEED, "train")
    findings, number = Findings(), 0
    for place, part in enumerate(data_set.parts):
        for row, picture in enumerate(data_set.pictures(part, findings)):
            number += 1
            yield (f"{place:06d}", f"{row:012d}"), _item(part, row, picture)
    shown, names = printable(argument), ", ".join(data_set.part_names())
    line = f"{shown} is {data_set.title}{f' ({printable(names)})' if names else ''}, which lists "
    line += counted(number, "picture")
    others = _unlisted(Path(argument), seen, exclude)
    if others:
        pattern = printable(os.path.join(argument, "**"))
        line += f"; {others} more in the folder {'is' if others == 1 else 'are'} left out, and {pattern!r} labels all"
    remarks.append(line)
    for kind, what in ((OUTSIDE, "outside of the data set's folder"), ("broken entries", "that cannot be read")):
        if kind in findings.by_kind:
            finding = findings.by_kind[kind]
            many = counted(finding.count, "entry", "entries")
            remarks.append(f"{shown}: {many} {what} left out, such as {finding.examples[0]}")


class SavedPictures:
    """Reads pictures of Hugging Face data sets on this machine, which stay open; safe to share between threads."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, str | None], ObjectTable] = {}

    def __call__(self, folder: str, split: str | None, row: int) -> bytes:
        """Return the content of a row's picture.

        Args:
            folder: Folder of the data set.
            split: Name of the split; None if the data set has none.
            row: Number of the row.

        Raises:
            OSError: It cannot be read, or is not there any more.
        """
        kept_library("datasets", _NEED, "train")
        table = self._tables.setdefault((folder, split), ObjectTable(folder, split))
        picture: Any = table.picture(row, lambda kind, example: None) if row < len(table.keys()) else None
        if not isinstance(picture, StoredPicture):
            raise OSError(f"{folder} has no picture in row {row}; it was changed after it was listed")
        return picture.load()


def _item(part: Path, row: int, picture: Picture) -> SourceItem:
    if isinstance(picture, Path):
        return SourceItem(os.path.abspath(picture))
    if "://" in picture.name:
        return SourceItem(picture.name)
    if isinstance(picture, TarPicture):
        place = ("tar", picture.container, picture.offset, picture.length)
        return SourceItem(f"{picture.container}/{picture.name}", place)
    folder, split = split_place(part)
    inside = "/".join(name for name in (split, picture.name) if name)
    return SourceItem(f"{folder}/{inside}", ("saved", folder, split, row))


def _unlisted(folder: Path, seen: SeenSources, exclude: Path | None) -> int:
    """Return how many files of a folder are called like pictures and were not listed."""
    if not folder.is_dir():
        return 0
    files = picture_files(folder)
    return sum(str(path) not in seen and (exclude is None or exclude not in path.parents) for path in files)
