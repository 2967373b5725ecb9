"""Data sets whose annotations lie picture by picture: what their readers share, and how they become COCO's content."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..error_text import reason
from ..model.picture_formats import PICTURE_SUFFIXES
from ..model.printable import printable
from ..model.text_prompt import shorten
from .annotation_options import DEFAULT_OPTIONS, AnnotationOptions
from .content import PICTURE, WHERE, BoxForm, Content
from .faults import Findings, Report
from .stored_pictures import Picture

# Pictures of a part of a stream: few enough to hold their boxes, enough to be worth a data loader's share.
_PART = 512
# Characters of a fault that names a file.
_LONGEST_FAULT = 400


@dataclass
class Mark:
    """A box of a picture as its file has it.

    Attributes:
        label: Its name, or its class number where the data set numbers its names.
        box: Four numbers in the form of the data set; None if the box is that of `polygons`.
        where: Where it was read from, for messages.
        polygons: Outlines, [x1, y1, x2, y2, ...] each.
        crowd: Whether it marks a region that neither teaches nor counts.
        area: Area of its segment in square pixels; None for that of the box.
    """

    label: Any
    box: Any
    where: str
    polygons: Any = None
    crowd: Any = 0
    area: Any = None


@dataclass
class PictureEntry:
    """A picture with its boxes.

    Attributes:
        name: Its path inside the data set, for messages.
        picture: Its file, which need not exist, or where it is stored.
        marks: Its boxes.
        size: Annotated width and height in pixels; None where there is none.
        image_id: Its id; None for its place in the data set.
    """

    name: str
    picture: Picture
    marks: list[Mark] = field(default_factory=list)
    size: tuple[Any, Any] | None = None
    image_id: Any = None


class PictureSet(ABC):
    """A split of a data set whose annotations lie picture by picture.

    Args:
        base: The data set's file or folder, or its id on the Hub.
        split: Name of the split as the data set has it; None for all of it.
        images: Folder of the pictures given by the user; None for the form's own places.
        options: Conventions of the data set.
    """

    form: ClassVar[str]
    title: ClassVar[str]
    holds_pictures: ClassVar[bool] = False
    box_form: BoxForm = "xyxy"
    is_relative: bool = False

    def __init__(
        self,
        base: str,
        split: str | None = None,
        images: str | Path | None = None,
        options: AnnotationOptions = DEFAULT_OPTIONS,
    ) -> None:
        self.base, self.split, self.options = base, split, options
        self.images = None if images is None else Path(images)

    @classmethod
    def splits(cls, base: str) -> dict[str, str]:
        """Return the data set's own name of each of the splits "train", "val" and "test" that it has."""
        return {}

    @classmethod
    def absent_split(cls, base: str, split: str) -> str | None:
        """Say why the data set names one of the three splits that is not there; None if it does not name it."""
        return None

    @classmethod
    def has_split(cls, base: str, split: str) -> bool:
        """Return whether the data set has a split of its own besides those of `splits`."""
        return False

    @abstractmethod
    def keys(self) -> Sequence[Any]:
        """Return what stands for each picture, in order."""

    def paths_outside(self) -> Sequence[str]:
        """Return the paths that `keys` left out because they lead outside the data set's folder."""
        return ()

    @abstractmethod
    def entry(self, key: Any, report: Report) -> PictureEntry | None:
        """Read a picture's annotations.

        Args:
            key: One of `keys`.
            report: Function that faults of single boxes are passed to.

        Returns:
            The picture and its boxes; None if it is left out, which was reported.

        Raises:
            ValueError: They cannot be read.
            OSError: Their file cannot be read.
        """

    def picture(self, key: Any, report: Report) -> Picture | None:
        """Return a picture alone; None if it is left out, which was reported.

        Args:
            key: One of `keys`.
            report: Function that faults are passed to.

        Raises:
            ValueError: What names it cannot be read.
            OSError: The file that names it cannot be read.
        """
        entry = self.entry(key, report)
        return None if entry is None else entry.picture

    def names(self) -> dict[Any, str] | None:
        """Return the name of each class number, or None if boxes have names themselves."""
        return None

    def box_numbers(self) -> tuple[BoxForm, bool]:
        """Return what the numbers of boxes are, and whether they are fractions of the picture."""
        return self.box_form, self.is_relative

    def finish(self, findings: Findings) -> None:  # noqa: B027  most forms have nothing to say
        """Report what shows only when all pictures were read."""

    def content(self, findings: Findings, begin: int = 0, end: int | None = None) -> Content:
        """Read the pictures from `begin` up to `end`, all by default.

        Raises:
            ValueError: The data set cannot be read.
        """
        box_form, is_relative = self.box_numbers()
        content = Content(box_form=box_form, is_relative=is_relative)
        names = self.names()
        numbered = {name: number for number, name in (names or {}).items()}
        number_of: dict[str, int] = {}
        keys = self.keys()
        if not keys:
            self.finish(findings)
            if findings.by_kind:
                return content
            raise ValueError(f"{printable(self.base)} has no pictures, though it is {self.title}; add them.")
        first_fault = ""
        for number, key in enumerate(keys[begin:end], begin):
            try:
                entry = self.entry(key, findings.add)
            except (OSError, ValueError) as error:
                fault = printable(f"{self.shown(key)}: {reason(error)}", _LONGEST_FAULT)
                findings.add("broken entries", fault)
                first_fault = first_fault or fault
                continue
            if entry is None:
                continue
            image_id = number if entry.image_id is None else entry.image_id
            image: dict[str, Any] = {"id": image_id, "file_name": entry.name, PICTURE: entry.picture}
            if entry.size is not None:
                image["width"], image["height"] = entry.size
            content.images.append(image)
            for mark in entry.marks:
                label = mark.label
                if names is None and isinstance(label, str) and label.strip():
                    label = number_of.setdefault(label, len(number_of))
                elif names is None:
                    label = f"no name: {shorten(label)}"
                elif isinstance(label, str):
                    label = numbered.get(label, label)
                content.annotations.append(_annotation(mark, image_id, label, len(content.annotations)))
        if names is None:
            # Labels are listed by name, whatever the order of the pictures.
            place = {name: index for index, name in enumerate(sorted(number_of))}
            new = {old: place[name] for name, old in number_of.items()}
            for annotation in content.annotations:
                annotation["category_id"] = new.get(annotation["category_id"], annotation["category_id"])
            names = {index: name for name, index in place.items()}
        content.categories = [{"id": number, "name": name} for number, name in names.items()]
        if not content.images and first_fault:
            findings.add("no usable entries", f"such as {first_fault}")
        if begin == 0 and end is None:
            self.finish(findings)
        return content

    def labels(self) -> list[str]:
        """Return the names, in the order of their numbers or else by name, reading some pictures at a time."""
        names = self.names()
        if names is not None:
            return list(names.values())
        found: set[str] = set()
        for begin, end in self.parts():
            found.update(category["name"] for category in self.content(Findings(), begin, end).categories)
        return sorted(found)

    def parts(self) -> list[tuple[int, int]]:
        """Return the ranges of pictures that are read at a time in a stream."""
        count = len(self.keys())
        return [(begin, min(begin + _PART, count)) for begin in range(0, count, _PART)]

    def shown(self, key: Any) -> str:
        """Return a key as messages show it."""
        return relative_name(key, self.base) if isinstance(key, Path) else str(key)

    def joined(self, rows: Any) -> Any:
        """Return a data set of rows with the pictures and further columns that this one holds for their image ids."""
        return rows


def _annotation(mark: Mark, image_id: Any, label: Any, number: int) -> dict[str, Any]:
    annotation = {"id": number, "image_id": image_id, "category_id": label, WHERE: mark.where, "iscrowd": mark.crowd}
    if mark.box is not None:
        annotation["bbox"] = mark.box
    if mark.polygons is not None:
        annotation["segmentation"] = mark.polygons
    if mark.area is not None:
        annotation["area"] = mark.area
    return annotation


def relative_name(path: Path, base: str) -> str:
    """Return a path inside a data set as messages show it."""
    root = Path(base)
    return os.path.relpath(path, root if root.is_dir() else root.parent)


def picture_files(folder: Path) -> list[Path]:
    """Return the files in a folder and its sub-folders that are called like pictures, in order."""
    return sorted(_walk(folder, PICTURE_SUFFIXES))


def files_of(folder: Path, *suffixes: str) -> list[Path]:
    """Return the files of a folder itself with these endings, in order."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                Path(entry.path) for entry in entries if entry.name.lower().endswith(suffixes) and entry.is_file()
            )
    except OSError:
        return []


def files_below(folder: Path, *suffixes: str) -> list[Path]:
    """Return the files of a folder and of those in it with these endings, in order; hidden ones are passed over."""
    return sorted(_walk(folder, suffixes))


def _walk(folder: Path, suffixes: Iterable[str]) -> Iterator[Path]:
    wanted = tuple(suffixes)
    for place, folders, files in os.walk(folder, followlinks=False):
        # Folders of tools, such as .ipynb_checkpoints, and of macOS archives.
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        for name in files:
            if name.lower().endswith(wanted) and not name.startswith("."):
                yield Path(place, name)


def is_inside(path: Path, roots: Iterable[str | Path]) -> bool:
    """Return whether a path lies in one of some folders, once ".." is resolved; links are followed."""
    place = os.path.abspath(path)
    return any(place == root or place.startswith(root.rstrip(os.sep) + os.sep) for root in map(os.path.abspath, roots))


def read_mapping(content: Any, what: str) -> Mapping[str, Any]:
    """Return a value of a file as a mapping.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{what} is {printable(shorten(content))}, not a mapping")
    return content
