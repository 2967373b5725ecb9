"""Predictions over a large data set by many processes or machines: the lines of one process, in the same order.

The rows are cut into shards, each of which is a whole number of batches, so that an image shares its forward pass with
the same ones as in one process. Shards wait in a folder beside the predictions until all of them are there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from ..evaluation.predict import cut, report_failure, undecoded
from ..evaluation.prediction_file import PredictionFile, Predictions, read_predictions
from .evaluation_order import PARTS, EvaluationOrder, portable_row
from .label_computing import cores, torch_threads
from .label_settings import model_fingerprint
from .label_store import LabelStore
from .label_workers import NoShard, Shard, ShardMaker, Tally, WorkerPool, on_own_device
from .rank_group import RankGroup
from .ranks import Ranks
from .ray_workers import RayCluster, RayPool, connected

# Rows of a shard at least, unless a batch is larger.
_ROWS = 32


@dataclass(frozen=True)
class Engine:
    """Who predicts.

    Attributes:
        workers: Number of processes of this machine, or of each rank.
        group: The ranks that share the work.
        cluster: A Ray cluster, which then does all of it.
    """

    workers: int = 1
    group: RankGroup = field(default_factory=lambda: RankGroup(Ranks()))
    cluster: RayCluster | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}; give at least 1.")
        if self.cluster is not None and (self.workers > 1 or self.group.ranks.world > 1):
            raise ValueError("A Ray cluster brings its own workers; give either it, or several workers or ranks.")

    @property
    def is_single(self) -> bool:
        """Whether this process does everything by itself."""
        return self.workers == 1 and self.group.ranks.world == 1 and self.cluster is None


def predict_shards(
    order: EvaluationOrder,
    rows: Any,
    store: PredictionFile,
    engine: Engine,
    *,
    limit: int | None = None,
    tell: Callable[[Tally], None] = lambda tally: None,
    say: Callable[[str], None] = print,
) -> Predictions | None:
    """Predict a data set with several processes or machines; the same call goes on with a run that was stopped.

    Args:
        order: The model, and what to look for.
        rows: Rows as for `predict`.
        store: File of the predictions, which every rank has open.
        engine: Who predicts. All processes must see the folder of the file.
        limit: Number of rows, from the first; None for all.
        tell: Function that is called with what was done.
        say: Function that is called with a line for the user.

    Returns:
        All predictions of the file, in rank 0; None in other ranks.

    Raises:
        OSError: The predictions cannot be written, or the workers cannot go on.
        ValueError: There is no such cluster.
    """
    work = _Work(order, rows, store, engine.group.ranks, limit)
    with connected(engine.cluster) if engine.cluster is not None else nullcontext():
        _make(work, engine, tell, say)
    engine.group.meet()
    if engine.group.ranks.rank > 0:
        return None
    return work.merged()


def _make(work: _Work, engine: Engine, tell: Callable[[Tally], None], say: Callable[[str], None]) -> None:
    """Make the shards of this rank that are not there."""
    shards = work.left(tell)
    threads = max(1, cores() // (engine.workers * engine.group.ranks.on_this_machine))

    def next_shard() -> Shard | NoShard:
        return next(shards, NoShard.MORE)

    if engine.cluster is not None:
        order = replace(work.order, fingerprint=model_fingerprint(work.order.model))
        RayPool(order, work.files, engine.cluster, say).run(next_shard, tell)
    elif engine.workers > 1:
        WorkerPool(work.order, work.files, engine.workers, threads, say).run(next_shard, tell)
    else:
        maker: ShardMaker | None = None
        with torch_threads(threads):
            for shard in shards:
                maker = maker or on_own_device(work.order, engine.group.ranks.local).maker(threads)
                content = maker.content(shard.items, None, ())
                work.files.write(work.order.name(shard.number), content)
                tell(work.order.tally(content))


class _Work:
    """The shards of a data set, and their files."""

    def __init__(
        self, order: EvaluationOrder, rows: Any, store: PredictionFile, ranks: Ranks, limit: int | None
    ) -> None:
        self.order, self.ranks = order, ranks
        self.files = LabelStore(store.path.parent)
        self._rows, self._store, self._limit = rows, store, limit
        self._size = order.batch_size * max(1, _ROWS // order.batch_size)
        self._done = {entry["image_id"] for entry in store.earlier.images}

    def left(self, tell: Callable[[Tally], None]) -> Iterator[Shard]:
        """Yield the shards of this rank that are not there."""
        for number, items in enumerate(self._shards()):
            if number % self.ranks.world != self.ranks.rank:
                continue
            if self._is_done(items) or self._entries(number, items) is not None:
                tell(Tally(len(items)))
            else:
                yield Shard(number, [portable_row(row, index) for index, row in items])

    def _shards(self) -> Iterator[list[tuple[int, Mapping[str, Any]]]]:
        return cut(enumerate(islice(undecoded(self._rows), self._limit)), self._size)

    def _is_done(self, items: list[tuple[int, Mapping[str, Any]]]) -> bool:
        return all(row.get("image_id", index) in self._done for index, row in items)

    def _entries(self, number: int, items: list[tuple[int, Mapping[str, Any]]]) -> list[dict[str, Any]] | None:
        """Return what the file of a shard holds; None if there is none, or one of other images."""
        name = self.order.name(number)
        if not self.files.exists(name):
            return None
        entries = [json.loads(line) for line in self.files.read(name).splitlines()]
        ids = {row.get("image_id", index) for index, row in items}
        return entries if {entry["image_id"] for entry in entries} == ids else None

    def merged(self) -> Predictions:
        """Append all shards to the file of predictions, and remove their own files.

        Raises:
            OSError: The file cannot be written.
        """
        failed = {entry["image_id"] for entry in self._store.earlier.failed}
        for number, items in enumerate(self._shards()):
            for entry in [] if self._is_done(items) else self._entries(number, items) or []:
                if "error" in entry:
                    report_failure(entry)
                if entry["image_id"] in self._done or ("error" in entry and entry["image_id"] in failed):
                    continue
                self._store.append(entry)
        predictions = read_predictions(self._store.path)
        self.files.remove(PARTS)
        return predictions
