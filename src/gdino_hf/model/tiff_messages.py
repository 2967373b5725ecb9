"""Messages of libtiff, which Pillow decodes compressed TIFF files with, kept from the terminal.

libtiff is written in C and prints a line to stderr for every damaged row, past Python's warnings and logging. Its
handlers for messages are set to none while a picture is decoded. stderr itself stays as it is, so that messages of
other threads and libraries appear as usual.
"""

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL

_SETTERS = ("TIFFSetWarningHandler", "TIFFSetErrorHandler")
_lock = threading.Lock()
_users = 0
_before: list[Any] = []


@contextmanager
def quiet_libtiff() -> Iterator[None]:
    """Inside the `with` block, libtiff prints nothing; a failed decoder still raises its error.

    Nothing changes where Pillow holds libtiff inside its own module, as on Windows.
    """
    global _users
    setters = _setters()
    # Threads decode side by side; the first one in and the last one out set the handlers.
    with _lock:
        _users += 1
        if _users == 1:
            _before[:] = [setter(None) for setter in setters]
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for setter, handler in zip(setters, _before, strict=False):
                    setter(handler)


@functools.lru_cache(maxsize=1)
def _setters() -> tuple[Any, ...]:
    """Return the functions of the libtiff that Pillow has loaded, which take a handler and return the earlier one."""
    path = _loaded_libtiff()
    # Take the library only if it is loaded already; a second copy would have handlers of its own.
    mode = getattr(os, "RTLD_NOLOAD", None)
    if path is None or mode is None:
        return ()
    try:
        library = ctypes.CDLL(path, mode=mode | os.RTLD_LAZY)
        setters = tuple(getattr(library, name) for name in _SETTERS)
    except (OSError, AttributeError):
        return ()
    for setter in setters:
        setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
    return setters


def _loaded_libtiff() -> str | None:
    if sys.platform == "darwin":
        found = sorted(Path(PIL.__file__).parent.glob(".dylibs/libtiff*.dylib"))
        return str(found[0]) if found else None
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            paths = [line.split(maxsplit=5)[5].rstrip("\n") for line in maps if "/libtiff" in line]
    except OSError:
        return None
    own = str(Path(PIL.__file__).parent.parent)
    # Another package may have brought a libtiff of its own.
    return next((path for path in paths if path.startswith(own)), next(iter(paths), None))
