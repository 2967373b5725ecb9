"""Row blocks on a queue: each worker takes a block and computes it alone, so nobody waits for a sleeping thread.

PyTorch splits every operation over all threads and waits at its end until each has finished its share. On a busy
machine, one of them is usually not scheduled, and thousands of operations each wait for it, actively. Here a long chain
of operations is split once, into blocks of rows. The calling thread takes blocks from a queue, and so does each helper
thread as soon as the system runs it; within a block, PyTorch uses one thread. The caller waits only for blocks that a
helper has begun, and it sleeps while it waits.

Blocks do not depend on the number of threads, so results do not either.
"""

import bisect
import ctypes
import functools
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

_here = threading.local()  # workers: the number of threads of this thread's next run_blocks, if it is set


class _Job:
    """Blocks of one call of `run_blocks`, taken by several threads.

    Args:
        function: Called with the number of a block.
        blocks: Number of blocks.
    """

    def __init__(self, function: Callable[[int], None], blocks: int) -> None:
        self.function, self.blocks = function, blocks
        self.inference, self.grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self._condition = threading.Condition()
        self._next = self._running = 0
        self.error: BaseException | None = None

    def work(self) -> None:
        """Compute blocks until none is left; an exception ends the job and is kept for the caller."""
        with self._condition:
            self._running += 1
        try:
            while (block := self._take()) is not None:
                self.function(block)
        except BaseException as error:
            with self._condition:
                self.error, self._next = self.error or error, self.blocks
        finally:
            with self._condition:
                self._running -= 1
                self._condition.notify_all()

    def _take(self) -> int | None:
        with self._condition:
            if self._next >= self.blocks:
                return None
            self._next += 1
            return self._next - 1

    def wait(self) -> None:
        """Sleep until no thread computes a block of this job."""
        with self._condition:
            self._condition.wait_for(lambda: self._running == 0)


class _Helpers:
    """Threads of this process that wait for jobs, started when they are first needed."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._count = 0

    @property
    def used(self) -> bool:
        """Whether a job was offered in this process."""
        return self._count > 0

    def offer(self, job: _Job, helpers: int) -> None:
        """Let up to `helpers` threads take part in a job."""
        with self._lock:
            while self._count < helpers:
                threading.Thread(target=self._serve, name=f"gdino_hf-{self._count}", daemon=True).start()
                self._count += 1
        for _ in range(helpers):
            self._jobs.put(job)

    def _serve(self) -> None:
        with one_thread():
            while True:
                job = self._jobs.get()
                with torch.inference_mode(job.inference), torch.set_grad_enabled(job.grad):
                    job.work()
                del job


_helpers = _Helpers()


def _after_fork() -> None:
    """Start over in a forked process, which has one thread: a copy of the one that forked."""
    global _helpers
    used, _helpers = _helpers.used, _Helpers()
    runtime = _runtime() if used else None
    if runtime is not None:
        # That thread's OpenMP threads are gone, and it would wait for them for ever. Threads started from now on get
        # their own.
        runtime.set_threads(1)
        logger.info("This forked process computes with one thread: PyTorch's other threads do not survive a fork.")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def thread_count() -> int:
    """Return how many threads `run_blocks` uses in this thread."""
    return getattr(_here, "workers", None) or torch.get_num_threads()


def run_blocks(function: Callable[[int], None], blocks: int) -> None:
    """Call `function(0)` to `function(blocks - 1)`, on as many threads as PyTorch uses in this thread.

    Args:
        function: Computes one block and writes its result in place. It must not depend on the order of the blocks.
        blocks: Number of blocks.

    Raises:
        Exception: What a call raised; blocks that had not begun are left out.
    """
    threads = min(thread_count(), blocks)
    if threads <= 1 or not can_split():
        for block in range(blocks):
            function(block)
        return
    job = _Job(function, blocks)
    _helpers.offer(job, threads - 1)
    with one_thread():
        job.work()
        job.wait()
    if job.error is not None:
        raise job.error


def run_together(function: Callable[[], None], blocks: int) -> None:
    """Call a function once on each of up to as many threads as PyTorch uses in this thread; see `run_blocks`.

    Args:
        function: Takes blocks from a queue of its own until none is left, which C code does without Python.
        blocks: Number of blocks in that queue, so that no more threads are called than there are blocks.
    """
    run_blocks(lambda _: function(), min(thread_count(), blocks))


@contextmanager
def only_blocks() -> Iterator[None]:
    """Let nothing but `run_blocks` use several threads in what this thread computes.

    Between row blocks are thousands of small operations. Split over threads, they gain little on a quiet machine and
    lose much on a busy one.
    """
    workers = thread_count()
    if workers <= 1 or not can_split():
        yield
        return
    with one_thread(workers):
        yield


@contextmanager
def one_thread(workers: int = 1) -> Iterator[None]:
    """Let PyTorch, oneDNN and MKL use one thread for what this thread computes; other threads keep their number.

    Args:
        workers: Number of threads that `run_blocks` uses meanwhile.
    """
    runtime = _runtime()
    assert runtime is not None
    before = torch.get_num_threads()  # makes PyTorch initialize this thread before its number is changed
    before_mkl, before_workers = runtime.set_threads(1), getattr(_here, "workers", None)
    _here.workers = workers
    try:
        yield
    finally:
        _here.workers = before_workers
        runtime.set_threads(before, before_mkl)


class _Runtime:
    """Sets the number of threads of the calling thread alone.

    `torch.set_num_threads` would also set the number that threads started later begin with.
    """

    def __init__(self) -> None:
        # Loaded with global symbols by torch, so the process's own table finds the copy that torch calls.
        self._omp = ctypes.CDLL(None).omp_set_num_threads
        self._omp.argtypes, self._omp.restype = [ctypes.c_int], None
        self._mkl = None
        if torch.backends.mkl.is_available():
            library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
            self._mkl = library.MKL_Set_Num_Threads_Local
            self._mkl.argtypes, self._mkl.restype = [ctypes.c_int], ctypes.c_int

    def set_threads(self, threads: int, mkl: int | None = None) -> int:
        """Set OpenMP's and MKL's number (`threads` if `mkl` is None); return MKL's number before, 0 if unset."""
        self._omp(threads)
        return 0 if self._mkl is None else self._mkl(threads if mkl is None else mkl)


@functools.cache
def _runtime() -> _Runtime | None:
    try:
        return _Runtime()
    except (AttributeError, OSError, TypeError):
        return None


@functools.cache
def can_split() -> bool:
    """Return whether one thread's number of threads can be set here, which is tried once in a thread of its own."""
    if _runtime() is None:
        return False
    found = []

    def attempt() -> None:
        before = torch.get_num_threads()
        with one_thread():
            found.append(torch.get_num_threads())
        found.append(torch.get_num_threads() - before)

    before = torch.get_num_threads()
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    works = found == [1, 0] and torch.get_num_threads() == before
    if not works:
        logger.info("Layers are not split into row blocks here: the threads of one thread cannot be set.")
    return works


@dataclass(frozen=True)
class RowBlocks:
    """Rows of a batch, cut into blocks that each belong to one image.

    Attributes:
        function: Called with the image and the rows of a block; it writes its result in place.
        images: Number of images.
        rows: Rows of each image.
        size: Largest number of rows in a block.
    """

    function: Callable[[int, slice], None]
    images: int
    rows: int
    size: int

    def __len__(self) -> int:
        return self.images * -(-self.rows // self.size)

    def __call__(self, number: int) -> None:
        """Compute one block."""
        image, part = divmod(number, -(-self.rows // self.size))
        self.function(image, slice(part * self.size, min(self.rows, (part + 1) * self.size)))


def even_rows(rows: int, size: int) -> int:
    """Return how many rows a block has if all are about equal, at most `size`, and their number is even or one.

    With equal blocks, two threads finish at the same time.
    """
    blocks = -(-rows // size)
    return -(-rows // (blocks + blocks % 2 if blocks > 1 else 1)) or 1


def run_rows(*parts: RowBlocks) -> None:
    """Compute all blocks of one or more sets of rows that do not depend on each other; see `run_blocks`."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(part))

    def block(number: int) -> None:
        index = bisect.bisect_right(starts, number) - 1
        parts[index](number - starts[index])

    run_blocks(block, starts[-1])
