"""One run at a time in a folder of results: a lock for processes of this machine, and a lease for those of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..whole_files import ATTEMPTS, make_folder, remove_empty
from .label_store import LabelStore
from .ranks import Ranks
from .run_lease import LEASE, LeaseWatch, RunLease, lease


class FolderLock:
    """Keeps other processes of the same rank away from a folder of results.

    The system frees the lock of a process that dies; its lease is found to be dead on this machine at once, and on
    others after a wait.

    Args:
        store: Files of the run.
        ranks: This process among those that share the work.
        say: Function that is called with a line for the user before a wait.
        also: Function that is called by `check`, too.
    """

    def __init__(
        self, store: LabelStore, ranks: Ranks, say: Callable[[str], None], also: Callable[[], None] = lambda: None
    ) -> None:
        self.ranks = ranks
        self._store, self._say, self._also = store, say, also
        self._lease: RunLease | None = None
        self._watches: dict[int, LeaseWatch] = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock during the `with` block.

        Raises:
            OSError: The folder cannot be made or written.
            ValueError: Another process has it.
        """
        import fsspec
        from filelock import FileLock, Timeout

        folder = self._store.folder
        lock = FileLock(self._path(".lock", self.ranks.rank), timeout=0)
        try:
            made = _acquire(lock, folder)
        except Timeout:
            raise ValueError(
                f"Another run is at work in {self._store.shown}; wait for it, or choose another folder."
            ) from None
        try:
            path = self._path(LEASE, self.ranks.rank)
            with lease(fsspec.filesystem("file"), str(path.absolute()), self._store.shown, self._say) as self._lease:
                yield
        except BaseException:
            # A run that was refused before its first file leaves no folder. The lock's file goes while it is locked, so
            # that no other process can hold it.
            if made and [path.name for path in folder.iterdir()] == [Path(lock.lock_file).name]:
                with suppress(OSError):
                    Path(lock.lock_file).unlink()
                remove_empty(made)
            raise
        finally:
            lock.release()

    def check(self) -> None:
        """Find out whether the lock is still held.

        Raises:
            WorkerError: Another run took the folder, because this one gave no sign of life for long.
        """
        self._also()
        if self._lease is not None:
            self._lease.check()

    def is_at_work(self, rank: int) -> bool:
        """Return whether the process of another rank runs, here or on another machine."""
        from filelock import FileLock, Timeout

        if rank == 0:
            return False
        try:
            with FileLock(self._path(".lock", rank), timeout=0):
                pass
        except Timeout:
            return True
        try:
            contents = self._path(LEASE, rank).read_bytes()
        except FileNotFoundError:
            return False
        return self._watches.setdefault(rank, LeaseWatch()).is_alive(contents)

    def _path(self, name: str, rank: int) -> Path:
        return self._store.path(name if rank == 0 else f"{name}-{rank}")


def _acquire(lock: Any, folder: Path) -> list[Path]:
    """Make a folder, acquire a lock in it, and return the folders that were missing, the innermost first."""
    missing: list[Path] = []
    for attempts_left in reversed(range(ATTEMPTS)):
        missing = make_folder(folder) or missing
        try:
            lock.acquire()
            break
        except FileNotFoundError:
            # Another process that tests whether it can write there may have removed the folder in between.
            if not attempts_left:
                raise
    return missing
