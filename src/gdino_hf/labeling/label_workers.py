"""Worker processes of one machine, each with its share of the cores; the main process hands out shards and counts.

A worker writes each shard's file itself. One that dies is replaced, and its shard is done again; pictures that workers
die of, also when they look at them alone, are recorded as failed. Workers end when the main process does, however it
ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from ..error_text import reason
from ..model.printable import printable
from .death_blame import MOST_DEATHS, Blame
from .label_store import LabelStore
from .shard_files import LabelRow

_MOST_DEATHS_AT_START = 3
# Seconds between two looks at the plan and the progress.
_PATIENCE = 0.2


@dataclass(frozen=True)
class Tally:
    """Numbers of pictures, boxes and failures that are done; negative for work that is lost and done again."""

    pictures: int = 0
    boxes: int = 0
    failed: int = 0

    @classmethod
    def of(cls, rows: Sequence[LabelRow]) -> Tally:
        """Count rows."""
        boxes = sum(len(row.found) for row in rows if row.found is not None)
        return cls(len(rows), boxes, sum(row.found is None for row in rows))

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.pictures + other.pictures, self.boxes + other.boxes, self.failed + other.failed)

    def __neg__(self) -> Tally:
        return Tally(-self.pictures, -self.boxes, -self.failed)


@dataclass(frozen=True)
class Shard:
    """A part of a run that is done at once: its number and its pictures."""

    number: int
    items: Sequence[Any]


class NoShard(Enum):
    """Why there is no shard to label: it is not planned yet, or there are no more."""

    YET = "yet"
    MORE = "more"


NextShard = Callable[[], Shard | NoShard]
"""Returns the next shard to label."""


class Watcher(Protocol):
    """What a process that makes a shard tells while it works."""

    def reading(self, place: int) -> None:
        """Is called before a picture is read, in any thread."""

    def finished(self, rows: Sequence[tuple[int, LabelRow]]) -> None:
        """Is called with places and rows of pictures that are labelled."""

    def done(self, places: Sequence[int], tally: Tally) -> None:
        """Is called with places of pictures that are done, and what they count for."""


class ShardMaker(Protocol):
    """A model that makes shards."""

    def content(self, items: Sequence[Any], watcher: Watcher | None, left_out: Collection[int]) -> bytes:
        """Return the content of the file of a shard.

        Args:
            items: The pictures.
            watcher: What to tell while it works.
            left_out: Places of pictures that are not touched, because processes died of them.
        """


class ShardOrder(Protocol):
    """What all processes and machines of a run are told: with which model to make shards of what."""

    @property
    def device(self) -> str:
        """Where the model computes: "auto", "cpu", "cuda", ..."""

    @property
    def key(self) -> str:
        """Text that differs between orders that need another model or other settings."""

    def on(self, device: str) -> ShardOrder:
        """Return the same order for another device."""

    def maker(self, threads: int) -> ShardMaker:
        """Load the model, which computes in this number of threads.

        Raises:
            Exception: The model cannot be used here, for reasons of many types.
        """

    def name(self, number: int) -> str:
        """Return the path of a shard's file inside the folder of results."""

    def tally(self, content: bytes) -> Tally:
        """Count what the file of a shard holds."""


class WorkerError(OSError):
    """The workers cannot go on; the message says why and what to do about it."""


@dataclass(frozen=True)
class Attempt:
    """What a worker does at a time: it makes a shard's file, or looks at one of its pictures, to see if it outlives it.

    Attributes:
        shard: The shard.
        left_out: Places of its pictures that are not touched.
        alone: Place of the one picture that is looked at, and nothing is written; None makes the file.
    """

    shard: Shard
    left_out: Collection[int] = ()
    alone: int | None = None


@dataclass
class _Worker:
    """A process and what it is doing.

    Attributes:
        process: The process.
        pipe: Connection to it.
        attempt: What it works on.
        reading: Places of pictures it began to read and has not finished.
        tally: What it has done of the shard.
        ready: Whether its model is loaded.
    """

    process: Any
    pipe: Connection
    attempt: Attempt | None = None
    reading: set[int] = field(default_factory=set)
    tally: Tally = field(default_factory=Tally)
    ready: bool = False


class WorkerPool:
    """Labels shards in several processes.

    Args:
        order: What the processes are told.
        store: Files of the run.
        workers: Number of processes.
        threads: Threads that the model of each process computes in.
        say: Function that is called with a line for the user.
    """

    def __init__(
        self, order: ShardOrder, store: LabelStore, workers: int, threads: int, say: Callable[[str], None]
    ) -> None:
        self._order, self._store, self._say = order, store, say
        self._count, self._threads = workers, threads
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._again: list[Attempt] = []
        self._blames: dict[int, Blame] = {}
        self._early_deaths = 0
        self._started = 0

    def run(self, next_shard: NextShard, tell: Callable[[Tally], None]) -> None:
        """Label all shards.

        Args:
            next_shard: Where shards come from.
            tell: Function that is called with what was done, every moment or so also with nothing.

        Raises:
            WorkerError: A shard's file cannot be written, a model cannot be loaded, or workers die at their start.
        """
        exhausted = False
        try:
            while True:
                while not exhausted and (worker := self._idle()) is not None:
                    attempt = self._next(next_shard)
                    exhausted = attempt is NoShard.MORE
                    if not isinstance(attempt, Attempt):
                        break
                    self._hand_over(worker, attempt)
                if exhausted and not self._again and all(worker.attempt is None for worker in self._workers):
                    return
                exhausted = exhausted and not self._again
                self._listen(tell)
        finally:
            self._end()

    def _next(self, next_shard: NextShard) -> Attempt | NoShard:
        if self._again:
            return self._again.pop(0)
        shard = next_shard()
        return Attempt(shard) if isinstance(shard, Shard) else shard

    def _idle(self) -> _Worker | None:
        """Return a worker without a shard, a new one if there may be more."""
        free = next((worker for worker in self._workers if worker.attempt is None), None)
        return self._start() if free is None and len(self._workers) < self._count else free

    def _start(self) -> _Worker:
        here, there = self._context.Pipe()
        arguments = (there, self._order, str(self._store.folder), self._threads, self._started)
        process = self._context.Process(target=work, args=arguments, name="gdino_hf-labeler", daemon=True)
        self._started += 1
        process.start()
        there.close()
        worker = _Worker(process, here)
        self._workers.append(worker)
        return worker

    def _hand_over(self, worker: _Worker, attempt: Attempt) -> None:
        worker.attempt, worker.reading, worker.tally = attempt, set(), Tally()
        # It may have died meanwhile, which `_listen` sees.
        with suppress(OSError):
            worker.pipe.send(attempt)

    def _listen(self, tell: Callable[[Tally], None]) -> None:
        """Take what workers say, and replace those that died."""
        pipes = {worker.pipe: worker for worker in self._workers}
        for pipe in wait(list(pipes), timeout=_PATIENCE):
            worker = pipes[pipe]  # type: ignore[index]
            try:
                while worker.pipe.poll():
                    self._take(worker, worker.pipe.recv(), tell)
            except WorkerError:
                # An OSError, too, but one that ends the run.
                raise
            except (EOFError, OSError):
                self._bury(worker, tell)
        tell(Tally())

    def _take(self, worker: _Worker, message: tuple[Any, ...], tell: Callable[[Tally], None]) -> None:
        kind, *values = message
        if kind == "ready":
            worker.ready = True
        elif kind == "reading":
            worker.reading.add(values[0])
        elif kind == "finished":
            places, tally = values
            worker.reading.difference_update(places)
            if worker.attempt is not None and worker.attempt.alone is None:
                worker.tally += tally
                tell(tally)
        elif kind == "written":
            attempt, worker.attempt = worker.attempt, None
            if attempt is not None and attempt.alone is not None:
                self._looked_at(attempt.shard, attempt.alone, died=False)
        elif kind == "lost":
            self._say(values[0])
        else:
            raise WorkerError(values[0])

    def _bury(self, worker: _Worker, tell: Callable[[Tally], None]) -> None:
        """Take away a worker that died, and decide what becomes of its shard."""
        worker.process.join()
        self._workers.remove(worker)
        worker.pipe.close()
        how = _how_it_ended(worker.process.exitcode)
        if not worker.ready:
            self._early_deaths += 1
            if self._early_deaths >= _MOST_DEATHS_AT_START:
                raise WorkerError(f"the worker processes end at their start ({how}); try fewer workers.")
        attempt = worker.attempt
        if attempt is None:
            self._say(f"a worker process {how} between two shards; nothing is lost")
            return
        tell(-worker.tally)
        shard = attempt.shard
        if attempt.alone is not None:
            if not worker.ready or not worker.reading:
                self._again.append(attempt)
                return
            source = getattr(shard.items[attempt.alone], "source", f"picture {attempt.alone}")
            self._say(f"a worker process {how} while it looked at {printable(source)} alone, which is left out")
            self._looked_at(shard, attempt.alone, died=True)
            return
        self._say(f"a worker process {how}; its shard of {len(shard.items)} pictures is done again")
        blame = self._blames.setdefault(shard.number, Blame(len(shard.items)))
        alone = blame.shard_died(worker.reading) if worker.ready else []
        if alone:
            self._say(f"worker processes died {MOST_DEATHS} times; {len(alone)} pictures at work are looked at alone")
        attempts = [Attempt(shard, alone=place) for place in alone]
        self._again += attempts or [Attempt(shard, tuple(sorted(blame.left_out)))]

    def _looked_at(self, shard: Shard, place: int, died: bool) -> None:
        """Go on with a shard once all its suspects were looked at alone."""
        blame = self._blames[shard.number]
        if blame.looked_at(place, died):
            self._again.append(Attempt(shard, tuple(sorted(blame.left_out))))

    def _end(self) -> None:
        for worker in self._workers:
            worker.process.kill() if worker.attempt is not None else worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers = []


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    return f"ended with status {code}"


class _Teller:
    """Sends a worker's progress to the main process, from several threads."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._lock = pipe, threading.Lock()

    def send(self, *message: Any) -> None:
        with self._lock:
            self._pipe.send(message)

    def reading(self, place: int) -> None:
        self.send("reading", place)

    def finished(self, rows: Sequence[tuple[int, LabelRow]]) -> None:
        self.done([place for place, _ in rows], Tally.of([row for _, row in rows]))

    def done(self, places: Sequence[int], tally: Tally) -> None:
        self.send("finished", list(places), tally)


def work(pipe: Connection, order: ShardOrder, folder: str, threads: int, number: int) -> None:
    """Make the shards that come through a pipe, in a process of its own.

    Args:
        pipe: Connection to the main process.
        order: What shards are made of.
        folder: Folder of results.
        threads: Threads that the model computes in.
        number: Number of the worker; with several GPUs, it chooses one.
    """
    # Ctrl-C reaches all processes of a terminal; the main process ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    _show_no_bars()
    teller, store = _Teller(pipe), LabelStore(folder)
    try:
        maker = on_own_device(order, number).maker(threads)
    except Exception as error:
        teller.send("failed", f"a worker cannot load the model ({reason(error)}); try fewer workers.")
        return
    teller.send("ready")
    while True:
        try:
            attempt = pipe.recv()
        except EOFError:
            return
        shard, alone = attempt.shard, attempt.alone
        items = shard.items if alone is None else shard.items[alone : alone + 1]
        try:
            content = maker.content(items, teller, attempt.left_out)
        except Exception as error:
            # The device is lost to this process; another one may do better.
            teller.send("lost", f"the model of a worker cannot go on ({reason(error)})")
            return
        try:
            if alone is None:
                store.write(order.name(shard.number), content)
        except OSError as error:
            teller.send(
                "failed",
                f"the results cannot be written ({reason(error, name_file=True)}); make room and "
                "repeat the command, which goes on where it stopped.",
            )
            return
        teller.send("written")


def on_own_device(order: ShardOrder, number: int) -> ShardOrder:
    """Return the order for the process of a number, which gets a GPU of its own if there are several."""
    import torch

    several = order.device == "auto" and torch.cuda.device_count() > 1
    return order.on(f"cuda:{number % torch.cuda.device_count()}") if several else order


def _show_no_bars() -> None:
    """Show no bars beside those of the main process, and let them take no semaphores, which killed processes leak."""
    from tqdm import tqdm
    from transformers.utils import logging

    tqdm.set_lock(threading.RLock())
    logging.disable_progress_bar()


def _end_with_parent() -> None:
    """End this process as soon as its parent ends, also if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="gdino_hf-parent", daemon=True).start()
