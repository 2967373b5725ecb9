"""Methods of `Detections` that turn masks into boxes, outlines, pictures and LabelMe files, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import labelme_exchange, mask_outlines, mask_pictures

if TYPE_CHECKING:
    from .detections import Detections


class MaskFormats:
    """Conversions of masks; they need shapely and pycocotools, which `pip install "gdino-hf[masks]"` installs."""

    @classmethod
    def _made(cls, values: Mapping[str, Any]) -> Detections:
        make: Any = cls
        found: Detections = make(**values)
        return found

    def tightened(self) -> Detections:
        """Return the detections with the bounds of their masks for boxes; the box of an empty mask stays.

        Raises:
            ValueError: There are no masks.
        """
        found: Any = self
        _check_masks(found)
        tight: Detections = replace(found, boxes=mask_outlines.mask_boxes(found.masks, found.boxes))
        return tight

    def polygons(self, exact: bool = False) -> list[list[np.ndarray]]:
        """Return the outlines of each mask, for tools that draw or edit polygons.

        Args:
            exact: Whether to follow the edge of every pixel. Otherwise corners are left out where the outline stays
                within a pixel and the area of each part within 2 %.

        Returns:
            For each box the polygon of each part of its mask: (M, 2) float64 x and y in pixels, along the edges of
            pixels and not closed. A hole is part of the polygon, with a line of no width to it and back. An empty mask
            has no polygon.

        Raises:
            ImportError: shapely is not installed.
            ValueError: There are no masks.
        """
        found: Any = self
        _check_masks(found)
        return [mask_outlines.mask_polygons(mask, exact=True) for mask in found.masks] if exact else self._polygons

    @cached_property
    def _polygons(self) -> list[list[np.ndarray]]:
        """The outlines of the masks, which several formats need."""
        found: Any = self
        return [mask_outlines.mask_polygons(mask) for mask in found.masks]

    def mask_picture(self, kind: Literal["objects", "labels"] = "objects") -> Any:
        """Return the masks as one picture of numbers, to save as PNG. Without masks, boxes are filled.

        Args:
            kind: "objects" numbers the boxes from 1 in their order, "labels" the labels in the order of `names`.

        Returns:
            A PIL image of the picture's size, with 8 bits a pixel, or 16 if numbers are above 255. Pixels of no object
            are 0; where masks overlap, the one with the higher score is on top.

        Raises:
            ValueError: There are more than 65,535 objects or labels, or there is no such kind.
        """
        return mask_pictures.mask_picture(self, kind)

    def to_labelme(self, file_name: str | None = None) -> dict[str, Any]:
        """Convert to the content of a LabelMe file.

        Args:
            file_name: The picture's path as seen from the file's folder; `source` by default.

        Returns:
            A polygon for each part of each mask, those of one object in a group, and a rectangle for each box without
            a mask or with an empty one. Scores are a field of each shape. Labels without a box have no place in it.

        Raises:
            ImportError: There are masks, but shapely is not installed.
        """
        return labelme_exchange.labelme_document(self, file_name)

    @classmethod
    def from_labelme(
        cls,
        content: Mapping[str, Any],
        names: Sequence[str] | None = None,
        source: str | None = None,
        size: tuple[int, int] | None = None,
    ) -> Detections:
        """Convert from the content of a LabelMe file.

        Args:
            content: Dict with "shapes". Polygons become masks, and their bounds boxes; shapes of one label and one
                group are one object. Shapes without extent, such as points, are left out, with a warning.
            names: All labels; None takes those of the shapes in order of appearance.
            source: Name of the picture; its "imagePath" by default.
            size: (width, height) of the picture in pixels; None reads the file's.

        Raises:
            ImportError: There are polygons, but pycocotools is not installed.
            ValueError: It is not such a file, or there is no size.
        """
        return cls._made(labelme_exchange.read_labelme(content, names, size, source))


def _check_masks(found: Any) -> None:
    if found.masks is None:
        raise ValueError("There are no masks; make them with gdino_hf.segmentation.Segmenter.")
