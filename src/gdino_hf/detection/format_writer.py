"""Base of what writes one format of a data set, picture by picture; its files take their places at the end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from ..whole_files import check_writable, whole_file


class FormatWriter:
    """Writes one format of a data set.

    Attributes:
        place: Path of the file, or of the folder of text files, inside the folder.
        shown: Path to show to the user.
        purpose: The format in a few words.
    """

    place = shown = purpose = ""

    def __init__(self, folder: Path, names: Sequence[str], stack: ExitStack) -> None:
        self.folder, self.names, self.stack = folder, names, stack

    @classmethod
    def check(cls, folder: Path) -> None:
        """Find out before the work whether the format can be written."""
        check_writable(folder / cls.place)

    def add(self, found: Any, name: str, number: int) -> None:
        """Write the next picture."""
        raise NotImplementedError

    def finish(self) -> None:
        """Write what follows the last picture."""

    def open(self, place: str) -> TextIO:
        """Open a text file that takes its place in the folder at the end."""
        unfinished = self.stack.enter_context(whole_file(self.folder / place))
        # Bytes of a file name that are not UTF-8 become escapes, which JSON reads as what they were.
        file = unfinished.open("w", encoding="utf-8", errors="backslashreplace", newline="\n")
        return self.stack.enter_context(file)
