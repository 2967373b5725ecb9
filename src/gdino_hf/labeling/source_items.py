"""One picture to label: its name, where its content is, and its place in the order of a run."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Key = tuple[str, ...]
"""Place of a picture in the order of its run; keys grow."""


@dataclass(frozen=True)
class SourceItem:
    """One picture to label.

    Attributes:
        source: Its unique name: absolute path or address; inside an archive, the archive's, a slash and the name there.
        place: Where its content is, if `source` is neither path nor address: ("tar", archive, first byte, size),
            ("parquet", file, column, row group, row) or ("saved", folder, split, row).
        fault: Reason why it cannot be read, if listing found one.
    """

    source: str
    place: tuple[Any, ...] | None = None
    fault: str | None = None

    def as_json(self) -> list[Any]:
        """Return a list that JSON can hold."""
        return [self.source, None if self.place is None else list(self.place), self.fault]

    @classmethod
    def of_json(cls, value: Sequence[Any]) -> SourceItem:
        """Return the item of such a list."""
        source, place, fault = value
        return cls(source, None if place is None else tuple(place), fault)


class SeenSources:
    """Names of pictures that were listed, as digests; all spellings of one file's path are one name."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def add(self, source: str) -> bool:
        """Take note of a picture, and return whether it is new."""
        before = len(self._digests)
        self._digests.add(_digest(source))
        return len(self._digests) > before

    def __contains__(self, source: str) -> bool:
        return _digest(source) in self._digests


def _digest(source: str) -> bytes:
    if "://" not in source:
        # A link to a picture is a picture of its own.
        folder, name = os.path.split(source)
        source = os.path.join(_resolved(folder), name)
    return hashlib.blake2b(os.fsencode(source), digest_size=12).digest()


@functools.lru_cache(maxsize=1024)
def _resolved(folder: str) -> str:
    return os.path.realpath(folder)
