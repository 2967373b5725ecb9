"""The image column of data sets: decoded with the package's formats and limits, and errors that name the file."""

from __future__ import annotations

from typing import Any

import datasets
from PIL import Image

from ..model.picture_files import open_picture
from .stored_pictures import referenced_picture


class PictureColumn(datasets.Image):
    """`datasets.Image` whose pictures are opened by `open_picture`; it is stored and compared like the stock column.

    Opening with the stock column would start any of Pillow's decoders, and its errors do not name the file.
    """

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> Image.Image:
        """Decode a row's picture, upright and in its own mode.

        Args:
            value: Dict with the "path" of a local file or its "bytes"; a picture is returned as it is.
            token_per_repo_id: Tokens for files on the Hub, as in the stock column.

        Raises:
            PictureError: A ValueError that names the file and says why it cannot be read.
        """
        if not self.decode or not isinstance(value, (dict, str)):
            return super().decode_example(value, token_per_repo_id)
        path, content = (value, None) if isinstance(value, str) else (value.get("path"), value.get("bytes"))
        stored = referenced_picture(path) if content is None and path else None
        if stored is not None:
            content = stored.load()
        if content is None and (path is None or "::" in path or "://" in path):
            return super().decode_example(value, token_per_repo_id)
        picture = open_picture(path, name=path) if content is None else open_picture(content, name=path)
        return picture if self.mode in (None, picture.mode) else picture.convert(self.mode)

    def __eq__(self, other: object) -> bool:
        # Equal to the stock column, so that data sets of both kinds can be joined.
        return isinstance(other, datasets.Image) and (self.mode, self.decode) == (other.mode, other.decode)

    def __hash__(self) -> int:
        return hash((self.mode, self.decode))
