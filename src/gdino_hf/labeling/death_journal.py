"""What processes were reading when they died, kept in files, so that their successors can leave it out.

Ray Data starts an actor again and again whose process dies of a picture, and tells the new one nothing.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from .label_workers import MOST_DEATHS, Tally
from .shard_files import LabelRow


class DeathJournal:
    """Notes about one group of pictures; the `Watcher` of the process that labels it.

    Args:
        folder: Folder that processes of this machine share.
        names: Names of the pictures, which tell groups apart.
    """

    def __init__(self, folder: str | Path, names: Sequence[str]) -> None:
        digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()
        self._path, self._number = Path(folder) / f"{digest[:32]}.txt", len(names)

    def begin(self) -> Collection[int]:
        """Note that a process begins, and return the places of the pictures that processes died of.

        These are the pictures that all of the first `MOST_DEATHS` processes were reading, and if processes still die,
        or were reading nothing in common, all pictures of the group.
        """
        tries = self._tries()
        self._note("try")
        if len(tries) < MOST_DEATHS:
            return ()
        suspects = set.intersection(*tries[:MOST_DEATHS])
        if len(tries) >= 2 * MOST_DEATHS or not suspects:
            return range(self._number)
        return sorted(suspects)

    def reading(self, place: int) -> None:
        """Note that a picture is being read."""
        self._note(f"reading {place}")

    def finished(self, rows: Sequence[tuple[int, LabelRow]]) -> None:
        """Note that pictures are labelled."""
        self.done([place for place, _ in rows], Tally())

    def done(self, places: Sequence[int], tally: Tally) -> None:
        """Note that pictures are done."""
        self._note(*(f"done {place}" for place in places))

    def end(self) -> None:
        """Remove the notes of a group that is done."""
        with suppress(OSError):
            self._path.unlink()

    def _note(self, *lines: str) -> None:
        # A disk without room must not stop the work.
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="ascii") as file:
                file.write("".join(f"{line}\n" for line in lines))

    def _tries(self) -> list[set[int]]:
        """Return what each earlier process had begun to read and not finished."""
        tries: list[set[int]] = []
        try:
            lines = self._path.read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):
            return tries
        for line in lines:
            kind, _, place = line.partition(" ")
            if kind == "try":
                tries.append(set())
            elif tries and place.isdecimal():
                (tries[-1].add if kind == "reading" else tries[-1].discard)(int(place))
        return tries


def journal_folder(run: str) -> Path:
    """Return the folder of the notes of a run on this machine.

    Args:
        run: Name of the run, which all its processes know.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir(), f"gdino-labels-{user}", run)
