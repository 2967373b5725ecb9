"""Pictures that lie inside larger files, such as tar shards and Parquet tables, used like paths of picture files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from ..model.picture_pixels import load_image

# How a picture inside a tar file is written as text: the file, the picture's name, its first byte and its length.
_REFERENCE = re.compile(r"(?s)(?P<file>.+)!(?P<name>.+)\?offset=(?P<offset>\d{1,18})&size=(?P<size>\d{1,18})")


@dataclass(frozen=True)
class StoredPicture:
    """A picture inside a larger file; it has the methods of a path that readers, checks and evaluation use.

    Attributes:
        container: The file or data set that holds it, for messages.
        name: Its name inside, for messages.
        load: Function that returns its content as bytes.
    """

    container: str
    name: str
    load: Callable[[], bytes]

    def is_file(self) -> bool:
        """Return True: what was found inside a file is there."""
        return True

    def open(self, mode: str = "rb") -> BinaryIO:
        """Return the content as an open binary file."""
        return io.BytesIO(self.load())

    def size(self) -> int:
        """Return the number of bytes of the content."""
        return len(self.load())

    def column_value(self) -> Any:
        """Return the value of a data set's image column: the content with its name."""
        return {"bytes": self.load(), "path": self.name}

    def __str__(self) -> str:
        return f"{self.container}!{self.name}"


@dataclass(frozen=True)
class TarPicture(StoredPicture):
    """A picture inside an uncompressed tar file, found again by its first byte and its length.

    Attributes:
        offset: First byte of the content in the tar file.
        length: Number of bytes of the content.
    """

    offset: int = 0
    length: int = 0

    def size(self) -> int:
        """Return the number of bytes of the content, without reading it."""
        return self.length

    def column_value(self) -> Any:
        """Return text that stands for the picture, so that a data set need not hold its content."""
        return str(self)

    def __str__(self) -> str:
        return f"{self.container}!{self.name}?offset={self.offset}&size={self.length}"


Picture = Path | StoredPicture
"""A picture's file, or a picture inside a larger file."""


def tar_picture(container: str, name: str, offset: int, length: int) -> TarPicture:
    """Return a picture inside a tar file, on disk or at an address that fsspec opens.

    Args:
        container: Path or address of the tar file.
        name: The picture's name inside.
        offset: First byte of its content.
        length: Number of bytes.
    """
    return TarPicture(container, name, lambda: read_part(container, offset, length), offset, length)


def referenced_picture(text: str) -> TarPicture | None:
    """Return the picture that a text from `TarPicture` stands for; None for any other text, and for existing files."""
    found = _REFERENCE.fullmatch(text)
    if found is None or Path(text).exists():
        return None
    return tar_picture(found["file"], found["name"], int(found["offset"]), int(found["size"]))


def read_part(container: str, offset: int, length: int) -> bytes:
    """Read some bytes of a file.

    Args:
        container: Path of a file, or an address that fsspec opens.
        offset: First byte.
        length: Number of bytes.

    Raises:
        OSError: The file cannot be read, or ends before.
    """
    with open_binary(container) as file:
        file.seek(offset)
        content = file.read(length)
    if len(content) != length:
        raise OSError(f"{container} ends before byte {offset + length}")
    return content


def read_all(container: str) -> bytes:
    """Return the content of a file on disk, or at an address that fsspec opens."""
    with open_binary(container) as file:
        return bytes(file.read())


def open_binary(container: str) -> Any:
    """Open a file on disk, or at an address that fsspec opens, for reading bytes at any place."""
    if "://" not in container:
        return open(container, "rb")
    import fsspec  # type: ignore[import-untyped]

    return fsspec.open(container, "rb").open()


def read_row_picture(value: Any) -> Image.Image:
    """Decode what a row has as "image".

    Args:
        value: A path, content, picture, `StoredPicture`, or a dict with "path" or "bytes".

    Raises:
        ValueError: It cannot be decoded.
    """
    if isinstance(value, StoredPicture):
        value = value.load()
    elif isinstance(value, Mapping):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    stored = referenced_picture(value) if isinstance(value, str) else None
    return load_image(value if stored is None else stored.load())


def image_value(picture: Picture) -> Any:
    """Return the value of a picture in a data set's image column."""
    return picture.column_value() if isinstance(picture, StoredPicture) else str(picture)


def row_picture(picture: Picture) -> Any:
    """Return what a row for evaluation has as "image": the path as text, or the stored picture, read when needed."""
    return str(picture) if isinstance(picture, Path) else picture


def content_or_path(picture: Picture) -> Any:
    """Return what a picture is opened from: its path, or its content."""
    return picture.load() if isinstance(picture, StoredPicture) else picture
