"""How to read annotation files whose conventions cannot be seen from their content."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

Crowds = Literal["ignore", "keep"]
BoxesFollow = Literal["auto", "upright", "stored"]
Sizes = Literal["stop", "scale"]
Groups = Literal["leave-out", "keep"]
Unreadable = Literal["stop", "skip"]
Paths = Literal["inside", "anywhere"]
BoxFormat = Literal["auto", "xywh", "xyxy", "cxcywh"]
FirstPixel = Literal["1", "0"]

_KINDS = {
    "crowds": Crowds,
    "boxes_follow": BoxesFollow,
    "sizes": Sizes,
    "groups": Groups,
    "unreadable": Unreadable,
    "paths": Paths,
    "box_format": BoxFormat,
    "first_pixel": FirstPixel,
}


@dataclass(frozen=True)
class AnnotationOptions:
    """Conventions of an annotation file; training, evaluation and checks take the same ones.

    Attributes:
        crowds: "ignore" takes boxes marked `iscrowd`, and those that Pascal VOC marks as difficult, as regions that
            neither teach nor count; "keep" takes them as boxes like all others, for files whose marks are wrong.
        boxes_follow: What the boxes of a picture with an EXIF orientation are pixels of: "upright" (the picture as it
            is seen), "stored" (the picture as it lies in the file), or "auto", which decides by the annotated width and
            height and takes "upright" where these fit both.
        sizes: What to do about an annotated size that is the picture's in the same proportion: "stop" refuses the file,
            "scale" scales the boxes to the picture.
        groups: "leave-out" leaves out a category without boxes that is only the supercategory of others, "keep" keeps
            it.
        unreadable: What to do about an image file that is missing or damaged: "stop" refuses the file, "skip" leaves
            the image out and counts it.
        paths: "inside" refuses images whose path leads outside the data set's folder (and the image folder that was
            given), as absolute paths and ".." can; "anywhere" takes them, for files from people you trust. Links are
            followed in either case.
        box_format: What the four numbers of a box are in `objects` of a Hugging Face data set and in the JSON of a tar:
            "xywh" (corner and size), "xyxy" (two corners), "cxcywh" (center and size), or "auto", which decides by all
            boxes and asks if several fit. Other forms say it themselves.
        first_pixel: Number of the first pixel in Pascal VOC documents: "1", as VOC has it, or "0", as some tools do.
        used: Names with boxes in other splits, which are not left out as groups. Splits beside the file are looked into
            without being named here.

    Raises:
        ValueError: A value is not one of those listed.
    """

    crowds: Crowds = "ignore"
    boxes_follow: BoxesFollow = "auto"
    sizes: Sizes = "stop"
    groups: Groups = "leave-out"
    unreadable: Unreadable = "stop"
    paths: Paths = "inside"
    box_format: BoxFormat = "auto"
    first_pixel: FirstPixel = "1"
    used: Collection[str] = ()

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}; give one of {', '.join(get_args(kind))}.")


DEFAULT_OPTIONS = AnnotationOptions()
