"""Annotated pictures on disk: their names, and writing them whole or not at all."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gdino_hf.whole_files import whole_file

from .inputs import ImageInput

_SAVED_AS_THEY_ARE = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
# Errors that the next picture would meet, too.
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


class OutputNames:
    """Chooses a path for each annotated picture, never that of an input and never the same one twice.

    Args:
        folder: Folder of the annotated pictures.
        images: All inputs of the run.
        annotated: Paths of the pictures that an earlier part of the run has written.
    """

    def __init__(self, folder: Path, images: Iterable[ImageInput], annotated: Iterable[str] = ()) -> None:
        self.folder = folder
        self.taken = {self._key(Path(image.source)) for image in images} | {self._key(Path(path)) for path in annotated}

    def __call__(self, name: str) -> Path:
        """Return the path for the picture of an image.

        Args:
            name: The image's `ImageInput.name`.
        """
        path = self.folder / name
        if path.suffix.lower() not in _SAVED_AS_THEY_ARE:
            path = path.with_name(path.name + ".png")
        stem, number = path.stem, 2
        while self._key(path) in self.taken:
            path = path.with_name(f"{stem}-{number}{path.suffix}")
            number += 1
        self.taken.add(self._key(path))
        return path

    @staticmethod
    def _key(path: Path) -> str:
        # Names that differ only in case are the same file on some file systems.
        return str(path.resolve()).lower()


def save_whole(picture: Any, path: Path) -> None:
    """Write a picture under another name, then rename it, so that the path never holds half a picture.

    Args:
        picture: PIL image.
        path: A path that `OutputNames` chose; its folder is made.

    Raises:
        OSError: The picture cannot be written.
    """
    with whole_file(path, durable=False) as unfinished:
        picture.save(unfinished, _SAVED_AS_THEY_ARE[path.suffix.lower()], quality=92)


def is_disk_error(error: BaseException) -> bool:
    """Whether an error is of the whole disk, such as a full one, and not of one file."""
    return isinstance(error, OSError) and error.errno in _OF_THE_DISK
