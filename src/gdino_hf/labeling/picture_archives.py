"""Pictures inside tar and Parquet files: listing them, and reading one of them at a time."""

from __future__ import annotations

import os
import posixpath
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from ..detection.exchange_values import kept_library
from ..model.picture_formats import PICTURE_SUFFIXES
from ..model.picture_limits import PictureLimits

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PARQUET_SUFFIX = ".parquet"

# Names of columns of bytes that are pictures, where the type of the column does not tell.
_PICTURE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "content", "image_bytes")
# Row groups that stay in memory. Two, because reading threads may be on both sides of a border.
_ROW_GROUPS = 2


def is_archive(name: str) -> bool:
    """Return whether a file is an archive by its name: a tar file, compressed or not, or a Parquet file."""
    return name.lower().endswith((*TAR_SUFFIXES, PARQUET_SUFFIX))


def open_any(address: str) -> Any:
    """Open a file of any kind of address for reading bytes.

    Args:
        address: Path, or address of any file system that fsspec knows; gzip is unpacked.

    Raises:
        OSError: It cannot be opened.
        ImportError: Its file system needs a library that is not installed.
    """
    import fsspec

    compression = "gzip" if address.lower().endswith((".gz", ".tgz")) else None
    if "://" not in address and compression is None:
        return open(address, "rb")
    return fsspec.open(address, "rb", compression=compression).open()


def tar_members(archive: str) -> Iterator[tuple[str, int, int]]:
    """Yield name, first byte and number of bytes of each picture in a tar file, in its order.

    Args:
        archive: Path or address. Only the headers of its members are read, unless it is compressed.

    Raises:
        OSError: It cannot be read.
        tarfile.TarError: It is damaged.
    """
    times: dict[str, int] = {}
    with closing(open_any(archive)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            # Long archives must not stay in memory.
            tar.members = []  # type: ignore[attr-defined]
            hidden = any(part.startswith(".") and part not in (".", "..") for part in member.name.split("/"))
            if member.isfile() and not hidden and member.name.lower().endswith(PICTURE_SUFFIXES):
                name = posixpath.normpath(member.name).lstrip("/")
                times[name] = times.get(name, 0) + 1
                if times[name] > 1:
                    # An archive may hold several files of one name.
                    stem, ending = posixpath.splitext(name)
                    name = f"{stem}#{times[name]}{ending}"
                yield name, member.offset_data, member.size


def parquet_rows(file: str) -> Iterator[tuple[str, str, int, int]]:
    """Yield name, column, row group and row of each picture in a Parquet file, in its order.

    Args:
        file: Path or address.

    Raises:
        ImportError: pyarrow is not installed.
        OSError: It cannot be read.
        ValueError: It is damaged, or no column holds pictures.
    """
    parquet = kept_library("pyarrow.parquet", "Parquet files need")
    with closing(open_any(file)) as opened, parquet.ParquetFile(opened) as table:
        column = picture_column(table.schema_arrow)
        if column is None:
            raise ValueError("no column of it holds pictures, as bytes or as a struct with bytes")
        number = 0
        for group in range(table.num_row_groups):
            for row in range(table.metadata.row_group(group).num_rows):
                # Without the pictures' own names: reading them would read the pictures.
                yield f"{number:08d}", column, group, row
                number += 1


def picture_column(schema: Any) -> str | None:
    """Return the name of the column of an Arrow schema that holds pictures: a struct with bytes, or bytes by name."""
    import pyarrow

    def holds_bytes(kind: Any) -> bool:
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    for column in schema:
        if pyarrow.types.is_struct(column.type):
            place = column.type.get_field_index("bytes")
            if place >= 0 and holds_bytes(column.type.field(place).type):
                return str(column.name)
    named = [column.name for column in schema if holds_bytes(column.type)]
    return next((name for wanted in _PICTURE_COLUMNS for name in named if name.lower() == wanted), None)


class ArchiveReader:
    """Reads single pictures from archives; safe to share between threads.

    Each thread keeps the tar file open that it read last, and the row groups read last are kept for all threads, so
    reading in the order of an archive reads each part of it once.
    """

    def __init__(self) -> None:
        self._here = threading.local()
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[str, str, int], Any] = OrderedDict()

    def member(self, archive: str, start: int, size: int) -> bytes:
        """Return the content of a tar file's member.

        Args:
            archive: Path or address of the tar file.
            start: First byte of the content.
            size: Number of bytes.

        Raises:
            OSError: The archive cannot be read, or is shorter than it was.
        """
        # One byte more than the limit, so that a larger picture is refused without being read as a whole.
        size = min(size, PictureLimits.current().bytes + 1)
        if getattr(self._here, "archive", None) != archive:
            self._close()
            self._here.file, self._here.archive = open_any(archive), archive
        try:
            self._here.file.seek(start)
            content: bytes = self._here.file.read(size)
        except BaseException:
            self._close()
            raise
        if len(content) != size:
            self._close()
            raise OSError(f"{archive} ends before byte {start + size}; it was changed after it was listed")
        return content

    def row(self, file: str, column: str, group: int, row: int) -> bytes | str:
        """Return the content of a row's picture, or its path if the row has a path alone.

        Args:
            file: Path or address of the Parquet file.
            column: Column of the pictures.
            group: Row group.
            row: Row inside the group.

        Raises:
            OSError: The file cannot be read.
            ValueError: The row has no picture.
        """
        key = (file, column, group)
        with self._lock:
            if key not in self._groups:
                while len(self._groups) >= _ROW_GROUPS:
                    self._groups.popitem(last=False)
                self._groups[key] = _read_group(*key)
            values = self._groups[key]
            self._groups.move_to_end(key)
        value: Any = values[row].as_py()
        path = None
        if isinstance(value, dict):
            value, path = value.get("bytes"), value.get("path")
        if value is None and path:
            return str(path) if "://" in path or os.path.isabs(path) else os.path.join(os.path.dirname(file), path)
        if value is None:
            raise ValueError("the row has no picture")
        return bytes(value)

    def _close(self) -> None:
        file, self._here.archive, self._here.file = getattr(self._here, "file", None), None, None
        if file is not None:
            file.close()


def _read_group(file: str, column: str, group: int) -> Any:
    parquet = kept_library("pyarrow.parquet", "Parquet files need")
    with closing(open_any(file)) as opened, parquet.ParquetFile(opened) as table:
        return table.read_row_group(group, columns=[column]).column(0)
