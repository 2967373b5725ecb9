"""Sort the files of a folder: pictures, pictures of kinds that are not read, and other files, which are counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..model.picture_formats import (
    END_BYTES,
    FOREIGN_SUFFIXES,
    PICTURE_SUFFIXES,
    READABLE,
    foreign_format,
    picture_format,
)
from ..model.printable import printable

NOT_READ = "it is {}, which is not read here; save it as " + READABLE
"""Reason why a picture of another kind has no result; the kind is filled in."""


@dataclass
class FolderFiles:
    """The files of a folder and its sub-folders, in order of their paths.

    Attributes:
        pictures: Files to read, each with the reason why it cannot be read, or None. Links that lead nowhere are among
            them, so that the user is told about them.
        others: Number of files that are not pictures.
        hidden: Number of files whose names, or whose folders' names, begin with a period.
    """

    pictures: list[tuple[Path, str | None]] = field(default_factory=list)
    others: int = 0
    hidden: int = 0

    def left_out(self, folder: Path | str) -> str | None:
        """Say in one line how many files of the folder are left out; None if there are none."""
        kinds = ((self.others, "not a picture", "not pictures"), (self.hidden, "hidden", "hidden"))
        counts = [
            f"{number} {'is' if number == 1 else 'are'} {one if number == 1 else many}"
            for number, one, many in kinds
            if number
        ]
        if not counts:
            return None
        total = self.others + self.hidden
        return f"{printable(folder)}: {total} file{'s' * (total != 1)} left out: {' and '.join(counts)}"


def sort_files(folder: Path, exclude: Path | None) -> FolderFiles:
    """Sort the files of a folder and its sub-folders by their names and, where these do not tell, by their content.

    Args:
        folder: The folder.
        exclude: Folder of results to skip and not to count, unless it is `folder` itself.
    """
    skip = exclude.resolve() if exclude is not None and exclude.resolve() != folder.resolve() else None
    found = FolderFiles()
    for file in sorted(folder.rglob("*")):
        is_dangling = file.is_symlink() and not file.exists()
        if not (file.is_file() or is_dangling):
            continue
        place = file.parent.resolve()
        if skip is not None and skip in (place, *place.parents):
            continue
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            found.hidden += 1
        elif is_dangling and file.suffix.lower() not in (*PICTURE_SUFFIXES, *FOREIGN_SUFFIXES):
            found.others += 1
        elif is_dangling or is_picture(file):
            found.pictures.append((file, None))
        elif (foreign := foreign_kind(file)) is not None:
            found.pictures.append((file, NOT_READ.format(foreign)))
        else:
            found.others += 1
    return found


def is_picture(file: Path) -> bool:
    """Whether a file is to be read: by its name, which may promise too much, or by its content."""
    suffix = file.suffix.lower()
    if suffix in PICTURE_SUFFIXES:
        return True
    start, end = _ends(file)
    kind = picture_format(start, end, guess=False)
    # Raw pictures of cameras are TIFF files, of which only a small preview could be read.
    return kind is not None and not (kind == "TIFF" and suffix in FOREIGN_SUFFIXES)


def foreign_kind(file: Path) -> str | None:
    """Say what kind of picture a file seems to be that is not read; None if it does not look like a picture."""
    suffix = file.suffix.lower()
    named = f"a picture of the kind {suffix}" if suffix in FOREIGN_SUFFIXES else None
    return foreign_format(_ends(file)[0]) or named


def _ends(file: Path) -> tuple[bytes, bytes]:
    """Return the first and the last bytes of a file; nothing if it cannot be read."""
    try:
        with file.open("rb") as opened:
            start = opened.read(1000)
            opened.seek(max(0, opened.seek(0, 2) - END_BYTES))
            return start, opened.read()
    except OSError:
        return b"", b""
