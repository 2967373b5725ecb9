"""Options about conventions of annotations, for the commands that read data sets but have no dataclass for them."""

from __future__ import annotations

import argparse
from typing import Any


def add_conventions(parser: argparse.ArgumentParser) -> None:
    """Declare the options about conventions of the annotations."""
    parser.add_argument(
        "--crowds",
        choices=("ignore", "keep"),
        default="ignore",
        help="boxes marked iscrowd, or difficult in Pascal VOC: ignore them as COCO does, or keep them as boxes like "
        "all others (default: ignore)",
    )
    parser.add_argument(
        "--boxes-follow",
        choices=("auto", "upright", "stored"),
        default="auto",
        help="what boxes of pictures with an EXIF orientation are pixels of: the upright picture, the stored one, or "
        "auto, by the annotated width and height (default: auto)",
    )
    parser.add_argument(
        "--sizes",
        choices=("stop", "scale"),
        default="stop",
        help="annotated sizes that are the picture's in proportion only: stop, or scale the boxes (default: stop)",
    )
    parser.add_argument(
        "--groups",
        choices=("leave-out", "keep"),
        default="leave-out",
        help="classes without boxes that only group others: leave-out, or keep (default: leave-out)",
    )
    parser.add_argument(
        "--paths",
        choices=("inside", "anywhere"),
        default="inside",
        help="photographs whose path leads outside the data set's folder: refuse them, or take them from anywhere, for "
        "files from people you trust (default: inside)",
    )
    parser.add_argument(
        "--box-format",
        choices=("auto", "xywh", "xyxy", "cxcywh"),
        default="auto",
        help="what the four numbers of a box in objects are: corner and size, two corners, or center and size "
        "(default: auto, by all boxes)",
    )
    parser.add_argument(
        "--first-pixel",
        choices=("1", "0"),
        default="1",
        help="number of the first pixel in Pascal VOC documents (default: 1, as VOC has it)",
    )


def annotation_options(args: argparse.Namespace, **others: Any) -> Any:
    """Return the conventions that were given as `AnnotationOptions`, with others in their place."""
    from gdino_hf.data.annotation_options import AnnotationOptions

    names = ("crowds", "boxes_follow", "sizes", "groups", "paths", "box_format", "first_pixel")
    return AnnotationOptions(**{name: getattr(args, name) for name in names} | others)
