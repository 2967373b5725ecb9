"""From what the user names to rows: the splits of a folder, what is wrong with them, and how they are augmented."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data.augmentation import default_transform
from ..data.checks import UNREADABLE, check_dataset
from ..data.formats import annotation_file, open_dataset
from ..data.reproducible_sampling import OnError
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

_SUFFIXES = (".json", ".jsonl", ".odvg")
_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class Split:
    """A data set that was read.

    Attributes:
        path: Its annotation file.
        rows: As `open_dataset` gives them.
        labels: Its names; none where captions say what to look for.
        remarks: What is odd about it and stops nothing, a line each.
    """

    path: Path
    rows: Any
    labels: list[str]
    remarks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its folder and file, as reports call it."""
        return f"{self.path.parent.name}/{self.path.stem}"

    @cached_property
    def truth(self) -> GroundTruth:
        """What there is to find, to the last digit of the file and with the areas of its segments."""
        return replace(open_ground_truth(self.path), rows=self.rows)


def read_split(
    path: str | Path, images: str | Path | None = None, streaming: bool = False, unreadable: OnError = "stop"
) -> Split:
    """Check and read an annotation file.

    Args:
        path: COCO json or ODVG json lines.
        images: Folder of the photographs; images/ beside the file by default.
        streaming: Read rows as they are walked through.
        unreadable: With "skip" a damaged picture is a remark and no reason to stop.

    Returns:
        Its rows and labels.

    Raises:
        ValueError: It cannot be trained on or measured with, or holds no photograph.
    """
    report = check_dataset(path, images)
    passed_over = (UNREADABLE,) if unreadable == "skip" else ()
    report.raise_for_errors(except_for=passed_over)
    if report.num_images == 0:
        raise ValueError(f"{path} holds no photograph; give a data set with some.")
    rows, labels = open_dataset(path, images, streaming)
    odd = [finding for finding in report.findings if not finding.is_error or finding.kind in passed_over]
    remarks = tuple(f"{path}: {finding}" for finding in odd)
    return Split(Path(path), rows, labels or [], remarks)


def find_split(place: str | Path, split: str) -> Path | None:
    """The annotation file of a split in a folder, or beside another split's file: train.json, or the one in train/.

    Args:
        place: A folder, or an annotation file.
        split: "train", "val" or "test".

    Returns:
        The file, None where there is none.
    """
    folder = Path(place)
    is_folder = folder.is_dir()
    folder = folder if is_folder else folder.parent
    names = [f"{name}{suffix}" for name in _SPLITS[split] for suffix in _SUFFIXES]
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is not None:
        return file
    if not is_folder:
        # Beside a file in a split's own folder are the other splits' folders.
        if not any(folder.name in own for own in _SPLITS.values()):
            return None
        folder = folder.parent
    inside = next((folder / name for name in _SPLITS[split] if (folder / name).is_dir()), None)
    try:
        return None if inside is None else annotation_file(inside, split)
    except ValueError:
        # A folder of pictures, say.
        return None


def split_file(place: str | Path, split: str, option: str) -> Path:
    """What an option names: a file as it is, or the file of a split where a folder is named.

    Args:
        place: What the user gave.
        split: Which one of a folder.
        option: Its name, for messages.

    Returns:
        The annotation file.

    Raises:
        ValueError: There is no such file.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(f"{option} {place} does not exist; give an annotation file, or a folder that holds one.")
    found = find_split(path, split)
    if found is None:
        wanted = " or ".join(f"{name}{suffix}" for name in _SPLITS[split] for suffix in _SUFFIXES[:2])
        raise ValueError(f"{option} {place} has no {split} split; put {wanted} there, or name the file itself.")
    return found


def augmentation(kind: str, size: Mapping[str, int], rows: Any) -> Transform | None:
    """The transform of a kind of pictures.

    Args:
        kind: "photo", "any-way-up", "small-set" or "none".
        size: The image processor's `size`.
        rows: What a mosaic takes other pictures from.

    Returns:
        The transform, None for none.
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
