"""The plan of a run: every picture in order, cut into shards of equal size, on disk before the shards are labelled.

What was planned stays as it is, whatever becomes of the sources, so a run that goes on finds each picture in the shard
where it was. A part of the plan is a file of JSON Lines: an item a line, and in the last line the key to go on from.
The file's name tells its number, how many items it has, and whether it is the last.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from itertools import count

from .label_store import PLAN, LabelStore
from .source_items import Key, SourceItem
from .sources import Sources

# Pictures in a part, about: small enough to be read for a shard, large enough that a plan has few files.
_PART = 10_000
_NAME = re.compile(r"(\d{6,})-(\d+)(-end)?\.jsonl")


class PlanReader:
    """Reads the shards of a plan, which another thread or process may still be writing.

    Args:
        store: Files of the run.
        shard_size: Number of pictures in a shard.
    """

    def __init__(self, store: LabelStore, shard_size: int) -> None:
        self._store, self._size = store, shard_size
        self._per_part = shards_per_part(shard_size)
        self._parts: list[tuple[str, int]] = []
        self._latest: tuple[int, list[SourceItem]] = (-1, [])
        self.ended = False
        """Whether all pictures are planned."""

    @property
    def pictures(self) -> int:
        """Number of pictures that are planned so far."""
        return sum(number for _, number in self._parts)

    @property
    def shards(self) -> int:
        """Number of shards that are planned so far."""
        return -(-self.pictures // self._size)

    def refresh(self) -> None:
        """Look for new parts."""
        if self.ended:
            return
        parts = _parts(self._store)
        self._parts = [(name, items) for name, items, _ in parts]
        self.ended = bool(parts) and parts[-1][2]

    def size(self, number: int) -> int:
        """Return the number of pictures in a shard of the plan."""
        return min(self._size, self.pictures - number * self._size)

    def items(self, number: int) -> list[SourceItem]:
        """Return the pictures of a shard of the plan.

        Raises:
            OSError: The plan cannot be read.
        """
        part, place = divmod(number, self._per_part)
        if self._latest[0] != part:
            lines = self._store.read(f"{PLAN}/{self._parts[part][0]}").splitlines()
            self._latest = part, [SourceItem.of_json(json.loads(line)) for line in lines[:-1]]
        return self._latest[1][place * self._size : (place + 1) * self._size]


class Planner:
    """Writes the plan in a thread, from where an earlier run left it.

    Args:
        store: Files of the run.
        sources: What there is to label.
        shard_size: Number of pictures in a shard.
    """

    def __init__(self, store: LabelStore, sources: Sources, shard_size: int) -> None:
        self._store, self._sources = store, sources
        self._part_size = shards_per_part(shard_size) * shard_size
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="gdino_hf-planner", daemon=True)

    def start(self) -> None:
        """Begin, or go on."""
        self._thread.start()

    def check(self) -> None:
        """Raise what stopped the planning.

        Raises:
            OSError: The plan cannot be written.
            ValueError: A source cannot be listed.
        """
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Stop after the current part."""
        self._stopped = True
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        try:
            write_plan(self._store, self._sources, self._part_size, lambda: self._stopped)
        except BaseException as error:
            self._error = error


def write_plan(store: LabelStore, sources: Sources, part_size: int, stopped: object = None) -> None:
    """Write the parts of the plan that are missing.

    Args:
        store: Files of the run.
        sources: What there is to label.
        part_size: Number of pictures in a part.
        stopped: Function that returns whether to stop; None never stops.

    Raises:
        OSError: A part cannot be written.
        ValueError: A source cannot be listed.
    """
    parts = _parts(store)
    if parts and parts[-1][2]:
        return
    after: Key | None = None
    if parts:
        last = store.read(f"{PLAN}/{parts[-1][0]}").splitlines()[-1]
        after = tuple(json.loads(last)["after"])
    found = sources.items(after)
    pending = _take(found, part_size)
    for number in count(len(parts)):
        following = _take(found, part_size) if len(pending) == part_size else []
        if callable(stopped) and stopped():
            return
        key = pending[-1][0] if pending else after
        lines = [json.dumps(item.as_json()) for _, item in pending] + [json.dumps({"after": key})]
        end = "" if following else "-end"
        # JSON with escapes alone: bytes of a file name that are not UTF-8 come back as they were.
        content = "".join(f"{line}\n" for line in lines).encode("ascii")
        store.write(f"{PLAN}/{number:06d}-{len(pending)}{end}.jsonl", content)
        if not following:
            return
        pending = following


def shards_per_part(shard_size: int) -> int:
    """Return the number of shards in a part of the plan."""
    return max(1, _PART // shard_size)


def _parts(store: LabelStore) -> list[tuple[str, int, bool]]:
    """Return name, number of items and whether it is the last, of each part up to the first that is missing."""
    found = {}
    for name in store.names(PLAN):
        match = _NAME.fullmatch(name)
        if match is not None:
            found[int(match[1])] = (name, int(match[2]), match[3] is not None)
    parts: list[tuple[str, int, bool]] = []
    while len(parts) in found:
        parts.append(found[len(parts)])
    return parts


def _take(found: Iterator[tuple[Key, SourceItem]], number: int) -> list[tuple[Key, SourceItem]]:
    taken = []
    for pair in found:
        taken.append(pair)
        if len(taken) == number:
            break
    return taken
