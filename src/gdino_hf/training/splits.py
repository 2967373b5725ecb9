"""Training, validation and test splits: find their annotation files, check and read them, choose an augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data.annotation_files import SUFFIXES, annotation_file, find_split
from ..data.annotation_options import DEFAULT_OPTIONS, AnnotationOptions
from ..data.augmentation import default_transform
from ..data.checks import check_dataset
from ..data.faults import MISSING, OUTSIDE, UNREADABLE
from ..data.formats import open_dataset
from ..data.forms import known_set
from ..data.frames import remembered_headers
from ..data.name_tokens import EQUAL_TOKENS, HALF_KNOWN, UNKNOWN
from ..data.other_formats import describe_other_format
from ..data.places import SPLIT_NAMES, is_there, split_place, with_split
from ..data.transforms import (
    Compose,
    RandomColour,
    RandomHalfTurn,
    RandomHorizontalFlip,
    RandomScaleCrop,
    Transform,
)
from ..evaluation.ground_truth import GroundTruth
from ..evaluation.open_ground_truth import open_ground_truth
from ..model.printable import printable

# The model is not known yet when data is checked; the trainer compares boxes with its queries.
_UNLIMITED = 10**9


@dataclass(frozen=True)
class Split:
    """A split that was read.

    Attributes:
        path: Its annotation file.
        rows: Its rows, from `open_dataset`.
        labels: Its label names; empty for a data set of captions.
        remarks: Warnings about the data that do not prevent training, one line each.
        most_boxes: Largest number of boxes in an image.
        images: Folder of the images, if one was named.
        options: Conventions of the annotation file.
        groups: Names that were left out because they only group others.
    """

    path: Path
    rows: Any
    labels: list[str]
    remarks: tuple[str, ...] = ()
    most_boxes: int = 0
    images: str | Path | None = None
    options: AnnotationOptions = DEFAULT_OPTIONS
    groups: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Folder and file name, and the split of a data set of several, as reports show them."""
        base, split = split_place(self.path)
        return printable(with_split(f"{Path(base).parent.name}/{Path(base).stem}", split))

    @cached_property
    def truth(self) -> GroundTruth:
        """Ground truth with the exact boxes of the annotation file and the areas of its segments."""
        return replace(open_ground_truth(self.path, self.images, self.options, log=False), rows=self.rows)


def read_split(
    path: str | Path,
    images: str | Path | None = None,
    streaming: bool = False,
    options: AnnotationOptions = DEFAULT_OPTIONS,
    measured: bool = False,
) -> Split:
    """Check and read an annotation file.

    Args:
        path: COCO JSON or ODVG JSON lines.
        images: Folder of the images; `images/` beside the file by default.
        streaming: Read rows while iterating instead of all at once.
        options: Conventions of the file. If unreadable images are skipped, a missing or damaged one is a remark instead
            of an error.
        measured: Whether the ground truth will be needed, which is then read while the images' headers are known.

    Returns:
        The split.

    Raises:
        ValueError: The annotations have errors, or there is no image.
    """
    with remembered_headers():
        report = check_dataset(path, images, options=options, num_queries=_UNLIMITED)
        report.raise_for_errors()
        if report.num_images == 0:
            raise ValueError(f"{printable(path)} has no images; give a data set that has some.")
        rows, labels = open_dataset(path, images, streaming, options, log=False)
        # The command checks names against the tokenizer of the model that it trains.
        told = (UNKNOWN, HALF_KNOWN, EQUAL_TOKENS)
        remarks = tuple(f"{printable(path)}: {finding}" for finding in report.warnings if finding.kind not in told)
        if not streaming and len(rows) == 0:
            left_out = (MISSING, UNREADABLE, OUTSIDE)
            why = next((f" ({finding})" for finding in report.findings if finding.kind in left_out), "")
            raise ValueError(
                f"None of the {report.num_images} images of {printable(path)} can be read{why}; repair it."
            )
        groups = tuple(report.groups)
        split = Split(Path(path), rows, labels or [], remarks, report.most_boxes, images, options, groups)
        if measured and split.labels:
            _ = split.truth
    return split


def split_file(place: str | Path, split: str, option: str) -> Path:
    """Return the annotation file that an option names, directly or by its folder.

    Args:
        place: The option's value, a file or a folder.
        split: Which split to look for in a folder.
        option: Name of the option, for error messages.

    Returns:
        The annotation file.

    Raises:
        ValueError: There is no such file.
    """
    base, own = split_place(place)
    path = Path(base).expanduser()
    known = known_set(base) if path.is_file() or not is_there(path) else None
    if own is not None:
        return annotation_file(place)
    if known is None and path.is_file():
        return path
    if known is None and not path.exists():
        raise ValueError(f"{option} {printable(place)} does not exist; give an annotation file, or a folder with one.")
    found = find_split(path if known is None else base, split)
    if found is None:
        if known is not None:
            has = printable(", ".join(known.splits.values()))
            raise ValueError(f"{option} {printable(place)} has no {split} split but {has}; name one after a colon.")
        other = describe_other_format(path)
        if other is not None:
            raise ValueError(f"{option}: {other}")
        wanted = " or ".join(f"{name}{suffix}" for name in SPLIT_NAMES[split] for suffix in SUFFIXES[:2])
        raise ValueError(
            f"{option} {printable(place)} has no {split} split; put {wanted} there, or name the file itself."
        )
    return found


def augmentation(kind: str, size: Mapping[str, int], rows: Any) -> Transform | None:
    """Return the augmentation for a kind of images.

    Args:
        kind: "photo", "any-way-up", "small-set" or "none".
        size: Size setting of the image processor, in pixels.
        rows: Rows from which a mosaic takes its other images.

    Returns:
        The transform; None for "none".
    """
    if kind == "none":
        return None
    if kind == "small-set":
        return default_transform(size, colour=0.5, mosaic=0.3, rows=rows)
    turn: list[Transform] = [RandomHalfTurn()] if kind == "any-way-up" else []
    return Compose(
        [
            RandomHorizontalFlip(),
            *turn,
            RandomScaleCrop(scale=(0.8, 1.5), probability=0.6),
            RandomColour(strength=0.2, probability=0.5),
        ]
    )
