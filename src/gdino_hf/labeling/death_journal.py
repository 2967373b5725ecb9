"""What processes died of, kept in files, so that their successors can leave it out.

Ray Data starts an actor again and again whose process dies of a picture, and tells the new one nothing.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .death_blame import MOST_DEATHS


class DeathJournal:
    """Notes about one group of pictures.

    Args:
        folder: Folder that processes of this machine share; None keeps no notes.
        names: Names of the pictures, which tell groups apart.
    """

    def __init__(self, folder: str | Path | None, names: Sequence[str]) -> None:
        digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()
        self._path = None if folder is None else Path(folder) / f"{digest[:32]}.txt"

    def begin(self) -> bool:
        """Note that a process begins, and return whether so many have died that pictures are to be looked at alone."""
        deaths = self._lines().count("try")
        self._note("try")
        return deaths >= MOST_DEATHS

    def is_deadly(self, place: int) -> bool:
        """Return whether a process died while it looked at a picture alone."""
        lines = self._lines()
        return lines.count(f"alone {place}") > lines.count(f"done {place}")

    @contextmanager
    def alone(self, place: int) -> Iterator[None]:
        """Note that a picture is looked at alone during the `with` block."""
        self._note(f"alone {place}")
        yield
        self._note(f"done {place}")

    def end(self) -> None:
        """Remove the notes of a group that is done, and the folder if they were the last."""
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink()
                self._path.parent.rmdir()

    def _note(self, line: str) -> None:
        if self._path is None:
            return
        # A disk without room must not stop the work.
        with suppress(OSError):
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            with self._path.open("a", encoding="ascii") as file:
                file.write(f"{line}\n")

    def _lines(self) -> list[str]:
        if self._path is None:
            return []
        try:
            return self._path.read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):
            return []


def journal_folder(run: str) -> Path | None:
    """Return the folder of the notes of a run on this machine, which only this user can look into.

    Args:
        run: Name of the run, which all its processes know and nobody can guess.

    Returns:
        The folder; None if it cannot be made, or is not this user's alone.
    """
    folder = Path(tempfile.gettempdir(), f"gdino-labels-{run}")
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        is_own = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o077)
        if stat.S_ISDIR(status.st_mode) and is_own:
            return folder
    return None
