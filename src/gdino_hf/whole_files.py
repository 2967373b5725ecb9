"""Files and folders that are whole or absent, whenever the process is killed or the disk becomes full.

Each is written under another name beside its place and then renamed, which a reader sees as one step. That name is
hidden and unique, so processes that write the same file do not meet, and tells whose it is, so a later process can
remove what a killed one left behind.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# .NAME.unfinished-MACHINE-PROCESS-RANDOM, and the file's ending.
_UNFINISHED = re.compile(r"\..*\.unfinished-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}")
# File systems allow 255 bytes, of which a character may take four.
_LONGEST_STEM = 40
# What another machine began and has not touched for so long was left behind.
_FORGOTTEN_SECONDS = 7 * 24 * 3600
ATTEMPTS = 100
"""Times that a folder is made, tested or put in place while other processes do the same."""

# Names in use by this process, and folders that it has tidied.
_in_use: set[str] = set()
_tidied: set[str] = set()


@contextmanager
def whole_file(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """Provide a name to write a file under, which takes the file's place at the end of the `with` block.

    Args:
        path: The file, which keeps its earlier content if the block raises an exception. Its folder is made.
        durable: Whether to wait until the disk has the content, so that the file is whole after a power failure too;
            thousands of small files are written faster without.

    Yields:
        Another name in the same folder, with the same ending.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _unfinished(path, path.suffix) as unfinished:
        try:
            yield unfinished
            if durable:
                flush(unfinished)
            os.replace(unfinished, path)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise


def write_whole_text(path: str | Path, text: str) -> None:
    """Write a text file as UTF-8, whole or not at all.

    Args:
        path: The file. Its folder is made.
        text: Its content. What cannot be encoded, such as bytes of a file name, is written as backslash escapes.

    Raises:
        OSError: The file cannot be written; an earlier one is unchanged.
    """
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_writable(path: str | Path) -> None:
    """Find out whether `whole_file` can write a file, before the work whose result it will hold.

    Args:
        path: The file, which stays as it is. Its folder is made for the test and removed again.

    Raises:
        OSError: It cannot be written.
    """
    path = Path(path)
    for attempts_left in reversed(range(ATTEMPTS)):
        made: list[Path] = []
        try:
            made = make_folder(path.parent)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "It is a folder", str(path))
            with _unfinished(path, path.suffix) as unfinished:
                unfinished.touch()
                unfinished.unlink()
            return
        except FileNotFoundError:
            # Another process that tests the same folder may have removed it again in between.
            if not attempts_left:
                raise
        finally:
            remove_empty(made)


def make_folder(path: str | Path) -> list[Path]:
    """Make a folder and those around it.

    Args:
        path: The folder, which may be there already.

    Returns:
        The folders that were missing, the innermost first, for `remove_empty`.

    Raises:
        OSError: One cannot be made; those that were made before it are removed.
    """
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for attempts_left in reversed(range(ATTEMPTS)):
        try:
            path.mkdir(parents=True, exist_ok=True)
            break
        except OSError as error:
            # Another process that tests the same folder may make and remove it in between.
            if not attempts_left or not isinstance(error, (FileExistsError, FileNotFoundError)):
                remove_empty(missing)
                raise
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders that nothing was written to, so that work that was refused leaves no trace.

    Args:
        folders: Folders, the innermost first, as `make_folder` returns them. Those with files stay.
    """
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Provide a folder to write in, which takes its place at the end of the `with` block.

    Args:
        path: The folder. An earlier one is replaced as a whole, or kept if the block raises an exception.

    Yields:
        An empty folder of the same name.

    Raises:
        OSError: The folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _unfinished(path) as around:
        # Called like its place, because some files name the folder that they are written to.
        unfinished = around / path.name
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
            for file in unfinished.iterdir():
                flush(file)
            _put_in_place(unfinished, path, around)
        finally:
            shutil.rmtree(around, ignore_errors=True)


def _put_in_place(unfinished: Path, path: Path, around: Path) -> None:
    """Replace a folder by another, although other processes may do the same."""
    for attempt in range(ATTEMPTS):
        old = around / f"old-{attempt}"
        with suppress(FileNotFoundError):
            path.rename(old)
        try:
            unfinished.rename(path)
            return
        except OSError as error:
            was_overtaken = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
            if not was_overtaken or attempt + 1 == ATTEMPTS:
                if old.exists() and not path.exists():
                    old.rename(path)
                raise


@contextmanager
def _unfinished(path: Path, ending: str = "") -> Iterator[Path]:
    """Provide a name beside a path that no other process and no other thread uses."""
    _tidy(path.parent)
    process = f"{machine_name()}-{os.getpid()}"
    name = f".{path.stem[:_LONGEST_STEM]}.unfinished-{process}-{secrets.token_hex(4)}{ending}"
    _in_use.add(name)
    try:
        yield path.with_name(name)
    finally:
        _in_use.discard(name)


def _tidy(folder: Path) -> None:
    """Remove what killed processes left in a folder, once for each folder."""
    place = os.path.abspath(folder)
    if place in _tidied:
        return
    _tidied.add(place)
    with suppress(OSError):
        # Collected first: removing while listing may skip entries.
        for path in list(folder.iterdir()):
            match = _UNFINISHED.match(path.name)
            if match is not None and _is_left_behind(path, match.group(1), int(match.group(2))):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _is_left_behind(path: Path, machine: str, process: int) -> bool:
    if machine == machine_name() and process == os.getpid():
        # Left by an earlier process that had the same number.
        return path.name not in _in_use
    gone = is_gone(machine, process)
    return time.time() - path.stat().st_mtime > _FORGOTTEN_SECONDS if gone is None else gone


def is_gone(machine: str, process: int) -> bool | None:
    """Return whether a process has ended; None if this machine cannot tell.

    Args:
        machine: `machine_name` where it ran.
        process: Its number there.
    """
    if machine != machine_name() or os.name != "posix":
        return None
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        # It is alive and another user's.
        pass
    return False


def machine_name() -> str:
    """Return 8 hexadecimal digits for what process numbers are unique in: a machine, or a container on it."""
    try:
        numbering = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        numbering = 0
    return f"{zlib.crc32(f'{platform.node()} {numbering}'.encode()):08x}"


def flush(path: Path) -> None:
    """Flush a file or folder to disk (fsync), so that a rename cannot become visible before the data.

    Args:
        path: The file or folder.

    Raises:
        OSError: The data cannot be written.
    """
    # Windows cannot open a folder for this.
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
