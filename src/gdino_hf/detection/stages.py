"""Overlapping stages of bulk work, such as decoding pictures while a model runs: ordered, bounded, in threads.

`in_order` and `in_batches` compute ahead of their reader, and `in_background` finishes what it is given behind its
caller. The caller's own thread does the work in the middle, so a model runs in the thread, the modes and the device
context of whoever started it, and Ctrl-C stops it as usual.

The threads sleep while there is nothing to do, and they are daemons: one that waits in a read that never ends does not
keep the process alive.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

LEAVING_SECONDS = 1.0
"""Longest wait for threads that still compute when their reader leaves. After it they end on their own."""

PATIENCE_SECONDS = 0.2
"""Longest wait for the rest of a batch before a smaller one is used."""


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int = 1, ahead: int = 2
) -> Generator[Result, None, None]:
    """Map a function over items in threads, and yield the results in the order of the items.

    Args:
        function: Called with one item at a time in each thread.
        items: The items. They are pulled by the threads, one at a time and only when one can be started, so a source
            that blocks does not delay results of earlier items.
        threads: Number of threads, 1 or more.
        ahead: Largest number of items that were pulled and whose results were not yielded yet, 1 or more.

    Yields:
        The results.

    Raises:
        ValueError: `threads` or `ahead` is less than 1.
        Exception: What the function or the source raised, after the results of all earlier items. Leaving early, by
            this or by closing the generator, stops the threads after the items they are working on.
    """
    _check(threads=threads, ahead=ahead)
    return _singles(_Stage(function, items, threads, ahead))


def in_batches(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    size: int,
    threads: int = 1,
    ahead: int | None = None,
    alike: Callable[[list[Result], Result], bool] | None = None,
) -> Generator[list[Result], None, None]:
    """Map a function over items as `in_order` does, and yield the results in batches.

    A batch is yielded before it is full if the next result takes longer than `PATIENCE_SECONDS`.

    Args:
        function: Called with one item at a time in each thread.
        items: The items.
        size: Largest number of results in a batch, 1 or more.
        threads: Number of threads, 1 or more.
        ahead: Largest number of items in flight, 1 or more; None for two batches.
        alike: Called with a batch and the next result; returns whether it may join. None lets all join.

    Yields:
        Lists of 1 to `size` results, in the order of the items.

    Raises:
        ValueError: A number is less than 1.
        Exception: What the function or the source raised, after all earlier results.
    """
    ahead = 2 * size if ahead is None else ahead
    _check(size=size, threads=threads, ahead=ahead)
    return _batches(_Stage(function, items, threads, ahead), size, alike)


@contextmanager
def in_background(function: Callable[[Item], Any], ahead: int = 2) -> Iterator[Callable[[Item], None]]:
    """Call a function with one item after the other in a thread, while the caller goes on.

    On leaving the block, also by an exception such as KeyboardInterrupt, the items that were handed over are finished.

    Args:
        function: Called with the items in the order in which they are handed over.
        ahead: Largest number of items that wait, 1 or more; then handing over waits.

    Yields:
        A function that hands one item over.

    Raises:
        ValueError: `ahead` is less than 1.
        Exception: What the function raised, from the next handing over or at the end of the block. Items that were
            handed over after the one that failed are dropped.
    """
    _check(ahead=ahead)
    worker = _Background(function, ahead)
    try:
        yield worker.hand_over
    finally:
        worker.finish()


def _check(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is {number}; give 1 or more.")


class _Slot(Generic[Result]):
    """The place of one result in the order."""

    value: Result
    error: BaseException | None = None
    is_done = False


class _Late:
    """What `_Stage.take` returns if the next result is not there in time."""


class _Stage(Generic[Item, Result]):
    """Threads that pull items from a source and compute their results; see `in_order`."""

    def __init__(self, function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int) -> None:
        self._function, self._items, self._ahead = function, iter(items), ahead
        self._changed = threading.Condition()
        self._pulling = threading.Lock()
        self._slots: deque[_Slot[Result]] = deque()
        self._is_left = self._is_ended = False
        self._running = threads
        self._threads = [
            threading.Thread(target=self._work, name="gdino_hf-stage", daemon=True) for _ in range(threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def take(self, timeout: float | None = None) -> _Slot[Result] | _Late | None:
        """Wait for the next result: its slot, or `_Late` after the timeout in seconds, or None after the last.

        Raises:
            BaseException: What the function or the source raised at this place.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._slots[0].is_done if self._slots else self._is_ended, timeout):
                return _Late()
            if not self._slots:
                return None
            slot = self._slots.popleft()
            self._changed.notify_all()
        if slot.error is not None:
            raise slot.error
        return slot

    def leave(self) -> None:
        """Start no further item, and wait a moment for the threads."""
        with self._changed:
            self._is_left = True
            self._changed.notify_all()
        end = time.monotonic() + LEAVING_SECONDS
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, end - time.monotonic()))

    def _work(self) -> None:
        while (started := self._pull()) is not None:
            slot, item = started
            try:
                slot.value = self._function(item)
            except BaseException as error:
                slot.error = error
            del item
            self._finish(slot)
        with self._changed:
            self._running -= 1
            is_last = self._running == 0
        if is_last and hasattr(self._items, "close"):
            # A generator may hold files open, or threads of a stage before this one.
            self._items.close()

    def _pull(self) -> tuple[_Slot[Result], Item] | None:
        """Return the next item with its slot as soon as one may be started; None if no more will be."""
        with self._pulling:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over() or len(self._slots) < self._ahead)
                if self._is_over():
                    return None
            slot: _Slot[Result] = _Slot()
            try:
                item = next(self._items)
            except BaseException as error:
                with self._changed:
                    self._is_ended = True
                    self._changed.notify_all()
                    if isinstance(error, StopIteration):
                        return None
                    slot.error = error
                    self._slots.append(slot)
                self._finish(slot)
                return None
            with self._changed:
                if self._is_left:
                    return None
                self._slots.append(slot)
            return slot, item

    def _is_over(self) -> bool:
        return self._is_left or self._is_ended

    def _finish(self, slot: _Slot[Result]) -> None:
        with self._changed:
            slot.is_done = True
            self._changed.notify_all()


def _singles(stage: _Stage[Any, Result]) -> Generator[Result, None, None]:
    try:
        stage.start()
        while isinstance(slot := stage.take(), _Slot):
            yield slot.value
    finally:
        stage.leave()


def _batches(
    stage: _Stage[Any, Result], size: int, alike: Callable[[list[Result], Result], bool] | None
) -> Generator[list[Result], None, None]:
    batch: list[Result] = []
    try:
        stage.start()
        while True:
            try:
                slot = stage.take(PATIENCE_SECONDS if batch else None)
            except BaseException:
                if batch:
                    yield batch
                raise
            fits = isinstance(slot, _Slot) and (alike is None or alike(batch, slot.value))
            if batch and not fits:
                yield batch
                batch = []
            if slot is None:
                return
            if isinstance(slot, _Slot):
                batch.append(slot.value)
            if len(batch) == size:
                yield batch
                batch = []
    finally:
        stage.leave()


class _Background(Generic[Item]):
    """A thread that calls a function with what it is handed; see `in_background`."""

    def __init__(self, function: Callable[[Item], Any], ahead: int) -> None:
        self._function, self._ahead = function, ahead
        self._changed = threading.Condition()
        self._waiting: deque[Item] = deque()
        self._is_closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="gdino_hf-background", daemon=True)
        self._thread.start()

    def hand_over(self, item: Item) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or len(self._waiting) < self._ahead)
            if self._error is None:
                self._waiting.append(item)
                self._changed.notify_all()
                return
        self._raise()

    def finish(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        try:
            self._thread.join()
        except BaseException:
            # An impatient Ctrl-C: only the second one leaves items behind.
            self._thread.join()
            raise
        self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                item = self._waiting.popleft()
                self._changed.notify_all()
            try:
                self._function(item)
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            del item
