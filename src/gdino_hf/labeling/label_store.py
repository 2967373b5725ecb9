"""The files of a run: each is written whole or not at all, and found by its name inside the folder of results."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from ..model.printable import printable
from ..whole_files import whole_file

MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.safetensors"
SHARDS = "shards"
PLAN = "plan"


class LabelStore:
    """The folder of results.

    Args:
        folder: The folder, which is made with its first file.
        shown: What the user calls it, such as the address that its files are sent to; None for its path.

    Attributes:
        shown: The same, as messages show it.
    """

    def __init__(self, folder: str | Path, shown: str | None = None) -> None:
        self.folder = Path(folder)
        self.shown = printable(shown or folder)

    def write(self, name: str, content: bytes) -> None:
        """Write a file, durably and whole or not at all; it replaces an earlier one.

        Args:
            name: Path inside the folder.
            content: What it holds.

        Raises:
            OSError: It cannot be written; an earlier one is unchanged.
        """
        with whole_file(self.folder / name) as unfinished:
            unfinished.write_bytes(content)

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Args:
            name: Path inside the folder.

        Raises:
            FileNotFoundError: There is none.
        """
        return (self.folder / name).read_bytes()

    def exists(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        return (self.folder / name).is_file()

    def names(self, inside: str) -> list[str]:
        """Return the names of the finished files of a folder inside, in order; none if there is no such folder."""
        try:
            return sorted(name for name in os.listdir(self.folder / inside) if not name.startswith("."))
        except FileNotFoundError:
            return []

    def remove(self, inside: str) -> None:
        """Remove a folder inside with its files, if it is there."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.folder / inside)

    def path(self, name: str) -> Path:
        """Return the path of a file."""
        return self.folder / name


def shard_name(number: int) -> str:
    """Return the path of a shard's file inside the folder of results."""
    return f"{SHARDS}/{number:08d}.parquet"


def finished_shards(store: LabelStore) -> set[int]:
    """Return the numbers of the shards that are written."""
    return {int(name.partition(".")[0]) for name in store.names(SHARDS) if name[:8].isdigit()}
