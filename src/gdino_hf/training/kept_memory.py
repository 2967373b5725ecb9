"""Keep freed memory in the process while a model trains on a CPU.

PyTorch takes every tensor of more than a few megabytes from the operating system and gives it back when it is freed. A
training step does so thousands of times, and the system clears every page anew before it hands it out. On Linux with
glibc, `mallopt` keeps the pages in the process, where the next step finds them.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Options of mallopt, and the values that glibc starts with.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _TOP_PAD: 128 * 1024, _MMAP_MAX: 65536}
_KEPT = {_TRIM_THRESHOLD: -1, _TOP_PAD: 64 * 2**20, _MMAP_MAX: 0}

_lock = threading.Lock()
_users = 0


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep what the process frees inside the `with` block, and give it back to the system at the end.

    The setting applies to the whole process. `GDinoTrainer` uses it around a training on a CPU; a program that trains
    in a loop of its own puts the loop inside. Blocks may be nested, and may run in several threads. Elsewhere than on
    Linux with glibc it does nothing. Limits that the process was started with (MALLOC_TRIM_THRESHOLD_ and the like) are
    replaced by glibc's own at the end.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    _count(libc, 1)
    try:
        yield
    finally:
        _count(libc, -1)


def _count(libc: ctypes.CDLL, change: int) -> None:
    """Count the `with` blocks that are entered; the first one changes the settings, and the last one restores them."""
    global _users
    with _lock:
        before, _users = _users, _users + change
        if before == 0 or _users == 0:
            for option, value in (_DEFAULTS if _users == 0 else _KEPT).items():
                libc.mallopt(option, value)
        if _users == 0:
            libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version.argtypes = []  # raises AttributeError in other C libraries
        libc.mallopt.argtypes, libc.mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
        libc.malloc_trim.argtypes, libc.malloc_trim.restype = [ctypes.c_size_t], ctypes.c_int
    except (OSError, AttributeError, TypeError):
        return None
    return libc
