"""Data sets that are one JSON file with a list, an entry for each picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from ..model.printable import printable
from .image_paths import ImagePaths
from .picture_sets import PictureSet
from .rows import read_json


class ListFile(PictureSet):
    """A data set whose `base` is a JSON file with a list.

    Attributes:
        entry_name: What an entry of the list is called in messages.
    """

    entry_name: ClassVar[str] = "entry"

    @cached_property
    def rows(self) -> list[Any]:
        """The list.

        Raises:
            ValueError: The file cannot be read, or holds something else.
        """
        content = read_json(self.base, self.title)
        if not isinstance(content, list):
            name = self.title.removesuffix(" json")
            raise ValueError(f"{printable(self.base)} holds a {type(content).__name__}; {name} has a list.")
        return content

    @cached_property
    def paths(self) -> ImagePaths:
        """Where the pictures are."""
        return ImagePaths(self.base, self.images, self.options)

    def keys(self) -> Sequence[int]:
        return range(len(self.rows))

    def shown(self, key: Any) -> str:
        return f"{self.entry_name} {key + 1}"
