"""The content of a data set in the terms of COCO, to which every form is brought before it is checked and used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

BoxForm = Literal["xywh", "xyxy", "cxcywh"]
"""What four numbers of a box are: corner and size, two corners, or center and size."""

PICTURE = "gdino:picture"
"""Key of an image's entry with the path or `StoredPicture` that its reader found."""

WHERE = "gdino:where"
"""Key of an annotation with the place it was read from, for messages."""


@dataclass
class Content:
    """Images, annotations and categories as COCO has them.

    Attributes:
        images: Entries with "id", "file_name", and "width" and "height" if they are known.
        annotations: Entries with "image_id", "category_id", and "bbox" or "segmentation" (polygons).
        categories: Entries with "id" and "name".
        box_form: What the numbers of "bbox" are.
        is_relative: Whether boxes and polygons are fractions of the image's width and height instead of pixels.
    """

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    categories: list[dict[str, Any]] = field(default_factory=list)
    box_form: BoxForm = "xywh"
    is_relative: bool = False
