"""Files and folders that are whole or absent, whenever the process is killed or the disk becomes full.

Each is written under another name beside its place and then renamed, which a reader sees as one step.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_MARK = ".unfinished"


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Provide a name to write a file under, which takes the file's place at the end of the `with` block.

    Args:
        path: The file, which keeps its earlier content if the block raises an exception. Its folder is made.

    Yields:
        Another name in the same folder, with the same ending.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}{_MARK}{path.suffix}")
    try:
        yield unfinished
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
    around = path.with_name(f"{path.name}{_MARK}")
    # Called like its place, because some files name the folder that they are written to.
    unfinished, old = around / path.name, around / "old"
    shutil.rmtree(around, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for file in unfinished.iterdir():
            flush(file)
        if path.exists():
            path.rename(old)
        unfinished.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(around, ignore_errors=True)


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
