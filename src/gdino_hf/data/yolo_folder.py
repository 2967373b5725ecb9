"""YOLO data sets: data.yaml or a list of class names, pictures in images/ and a label file for each in labels/.

supervision's `DetectionDataset.from_yolo` is not used: it stops at the first label that it cannot read, opens every
picture to learn its size, takes one folder of pictures and one of labels, and reads no lists of pictures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..error_text import reason
from ..model.printable import printable
from ..model.text_prompt import shorten
from .faults import OUTSIDE, Findings, Report
from .picture_sets import Mark, PictureEntry, PictureSet, files_of, is_inside, picture_files, relative_name
from .places import SPLIT_NAMES, is_there
from .rows import is_file
from .yolo_lines import parse_yolo_line

YAMLS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
"""Usual names of the file that describes a data set."""

NAME_LISTS = ("classes.txt", "obj.names", "classes.names", "labels.txt", "names.txt", "_darknet.labels")
"""Usual names of the file with a class name a line, of data sets without such a file."""

_MOST_YAML_BYTES = 2**22


class YoloFolder(PictureSet):
    """A YOLO data set; `base` is its data.yaml, or its folder if it has a list of names instead."""

    form = "yolo"
    title = "a YOLO folder with data.yaml"
    box_form = "cxcywh"
    is_relative = True

    @classmethod
    def splits(cls, base: str) -> dict[str, str]:
        place = Path(base)
        if place.is_dir():
            return {split: name for split, name in _own_splits(place) if _split_folder(place, name) is not None}
        content = read_yaml(place)
        found = {split: name for split, name in _all_names() if _places(content, place.parent, name)[1]}
        # One that does not exist is named when it is read.
        return found or {split: name for split, name in _all_names() if content.get(name)}

    @classmethod
    def absent_split(cls, base: str, split: str) -> str | None:
        content = {} if Path(base).is_dir() else read_yaml(Path(base))
        named = next((content[name] for name in SPLIT_NAMES[split] if content.get(name)), None)
        return None if named is None else f"{printable(base)} names {shorten(named)} for {split}, which does not exist"

    @cached_property
    def _description(self) -> Mapping[str, Any]:
        return {} if Path(self.base).is_dir() else read_yaml(Path(self.base))

    @cached_property
    def _names_places(self) -> bool:
        """Whether data.yaml says where the pictures of some split are."""
        return any(self._description.get(name) for _, name in _all_names())

    @cached_property
    def folder(self) -> Path:
        """Folder of the data set."""
        return Path(self.base) if Path(self.base).is_dir() else Path(self.base).parent

    def names(self) -> dict[Any, str]:
        if not self._description:
            return dict(enumerate(_listed_names(self.folder)))
        return yaml_names(self._description, self.base)

    @cached_property
    def _keypoints(self) -> int:
        shape = self._description.get("kpt_shape")
        if not (isinstance(shape, Sequence) and len(shape) == 2 and all(isinstance(side, int) for side in shape)):
            return 0
        return int(shape[0]) * int(shape[1])

    @cached_property
    def _outside(self) -> list[str]:
        return []

    def paths_outside(self) -> Sequence[str]:
        return self._outside

    def keys(self) -> Sequence[Path]:
        return self._pictures

    @cached_property
    def _pictures(self) -> list[Path]:
        if self.images is not None:
            return picture_files(self.images)
        if not self._names_places:
            place = _split_folder(self.folder, self.split) if self.split else self.folder
            return picture_files(place or self.folder)
        value = self._description.get(self.split or "train")
        given = value if isinstance(value, list) else [value]
        found: dict[Path, None] = {}
        for each in given:
            if not isinstance(each, str) or not each.strip():
                raise ValueError(
                    f"{printable(self.base)} has {shorten(each)} for {self.split or 'train'}; give a folder, or a text "
                    "file with a picture a line."
                )
            place = self._place(each)
            if place is not None:
                found.update(dict.fromkeys(self._listed(place) if place.is_file() else picture_files(place)))
        return list(found)

    def _place(self, name: str) -> Path | None:
        """Find the folder or list that data.yaml names, relative to its `path`, to itself, or as exports write it."""
        there = [place for place in _candidates(self._description, self.folder, name) if is_there(place)]
        allowed = [place for place in there if self.options.paths == "anywhere" or is_inside(place, [self.folder])]
        if allowed:
            return Path(os.path.normpath(allowed[0]))
        if there:
            self._outside.append(f"its path {shorten(name)} leads outside the data set's folder")
            return None
        raise ValueError(
            f"{printable(self.base)} names {shorten(name)}, which does not exist; correct it, or name the folder of "
            "the pictures (--images)."
        )

    def _listed(self, place: Path) -> Iterator[Path]:
        """Yield the pictures of a list, whose lines are relative to the data set or to the list."""
        if place.suffix.lower() != ".txt":
            yield place
            return
        try:
            lines = place.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise ValueError(f"{printable(place)} cannot be read as a list of pictures ({reason(error)}).") from error
        root = self._description.get("path")
        for line in filter(None, map(str.strip, lines)):
            places = [place.parent / line, self.folder / line]
            if isinstance(root, str):
                places.insert(0, self.folder / root / line)
            there = [path for path in places if is_file(path)] or places[:1]
            allowed = [path for path in there if self.options.paths == "anywhere" or is_inside(path, [self.folder])]
            if allowed:
                yield Path(os.path.normpath(allowed[0]))
            else:
                self._outside.append(f"its path {shorten(line)} leads outside the data set's folder")

    def picture(self, key: Path, report: Report) -> Path:
        return key

    def entry(self, key: Path, report: Report) -> PictureEntry | None:
        name = relative_name(key, str(self.folder))
        entry = PictureEntry(name, key)
        labels = self.label_file(key)
        if labels is None:
            return entry
        where = relative_name(labels, str(self.folder))
        # Label files are ASCII but for comments that some tools write.
        text = labels.read_text(encoding="utf-8-sig", errors="replace")
        entry.marks = yolo_marks(text, where, report, self._keypoints)
        return entry

    def label_file(self, picture: Path) -> Path | None:
        """Return a picture's label file; None if it has none, which means that it has no objects."""
        return next((path for path in self._label_places(picture) if is_file(path)), None)

    def _label_places(self, picture: Path) -> Iterator[Path]:
        name = picture.stem + ".txt"
        parts = list(picture.parts)
        for place in range(len(parts) - 2, -1, -1):
            if parts[place].lower() == "images":
                yield Path(*parts[:place], "labels", *parts[place + 1 : -1], name)
                break
        yield picture.with_name(name)
        if self.images is not None:
            inside = picture.relative_to(self.images).parent
            for folder in ("labels", f"labels/{self.split}", f"{self.split}/labels"):
                yield self.folder / folder / inside / name

    def finish(self, findings: Findings) -> None:
        for fault in self._outside:
            findings.add(OUTSIDE, fault)
        files = {path: self.label_file(path) for path in self._pictures}
        folders = {path.parent for path in files.values() if path is not None}
        if files and not folders:
            first = next(iter(files))
            wanted = relative_name(next(self._label_places(first)), str(self.folder))
            findings.add("no label files", f"{shorten(first.name)}: {wanted}")
        known = {path for path in files.values() if path is not None}
        for folder in sorted(folders):
            for path in files_of(folder, ".txt"):
                if path not in known and path.name not in (*NAME_LISTS, "README.txt", "readme.txt"):
                    findings.add("labels without pictures", relative_name(path, str(self.folder)))


def yolo_marks(text: str, where: str, report: Report, keypoints: int = 0) -> list[Mark]:
    """Return the boxes of a YOLO label file, with class numbers and fractions.

    Args:
        text: The file's content.
        where: The file, for messages.
        report: Function that faults of single lines are passed to.
        keypoints: Number of values of keypoints that follow the box in every line.
    """
    marks = []
    for number, line in enumerate(text.splitlines(), 1):
        place = f"{where} line {number}"
        try:
            parsed = parse_yolo_line(line, keypoints)
        except ValueError as error:
            report("broken boxes", f"{place}: {error}")
            continue
        if parsed is not None:
            outline = None if parsed.outline is None else [parsed.outline]
            marks.append(Mark(parsed.number, parsed.box, place, outline))
    return marks


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read a data.yaml.

    Raises:
        ValueError: It cannot be read.
    """
    import yaml

    try:
        if path.stat().st_size > _MOST_YAML_BYTES:
            raise ValueError(f"it has more than {_MOST_YAML_BYTES >> 20} MB")
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{printable(path)} cannot be read as YAML ({reason(error)}).") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{printable(path)} holds a {type(content).__name__}; it needs names and train, as YOLO has.")
    return content


def yaml_names(content: Mapping[str, Any], base: str) -> dict[Any, str]:
    """Return the names of a data.yaml by class number.

    Args:
        content: The file's content.
        base: The file, for messages.

    Raises:
        ValueError: There are none, or their number is not `nc`.
    """
    given = content.get("names")
    if isinstance(given, Mapping):
        pairs = list(given.items())
    elif isinstance(given, list):
        pairs = list(enumerate(given))
    else:
        raise ValueError(f"{printable(base)} has no names of its classes; write them as a list under names.")
    names: dict[Any, str] = {}
    for number, name in pairs:
        try:
            # YAML reads a bare 1 or yes as a number or a truth value.
            names[int(number)] = name if isinstance(name, str) else str(name)
        except (TypeError, ValueError):
            raise ValueError(f"{printable(base)} has the class number {shorten(number)}; give whole numbers.") from None
    count = content.get("nc")
    if isinstance(count, int) and count != len(names):
        raise ValueError(f"{printable(base)} has {len(names)} names but nc is {count}; correct one of them.")
    return names


def names_file(folder: Path) -> Path | None:
    """Return the file of a folder, or of its labels/ and train/ folder, with a class name a line; None without one."""
    places = (folder, folder / "labels", folder / "train", folder / "train" / "labels", folder.parent)
    return next((place / name for place in places for name in NAME_LISTS if is_file(place / name)), None)


def _listed_names(folder: Path) -> list[str]:
    file = names_file(folder)
    if file is None:
        raise ValueError(
            f"{printable(folder)} holds YOLO labels but neither data.yaml nor classes.txt, so their classes have no "
            "names; write data.yaml with names, and train with the folder of the pictures."
        )
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{printable(file)} cannot be read as a list of names ({reason(error)}).") from error
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _places(content: Mapping[str, Any], folder: Path, split: str) -> tuple[list[str], list[Path]]:
    """Return what a data.yaml names for a split, and the places of these that exist."""
    value = content.get(split)
    given = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str) and each.strip()]
    return given, [place for name in given for place in _candidates(content, folder, name) if is_there(place)]


def _candidates(content: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Return where a folder or list named in data.yaml can be: below its `path`, beside it, or as exports write it."""
    root = content.get("path")
    start = folder / root if isinstance(root, str) else folder
    # Roboflow writes ../train/images for a folder beside data.yaml, and `path` is often that of another machine.
    return [start / name, folder / name, folder / name.lstrip("./").replace("../", "")]


def _all_names() -> Iterator[tuple[str, str]]:
    # Reversed, so that the usual name of a split stands when a file has several.
    for split, names in SPLIT_NAMES.items():
        yield from ((split, name) for name in reversed(names))


def _own_splits(folder: Path) -> Iterator[tuple[str, str]]:
    return ((split, name) for split, name in _all_names() if _split_folder(folder, name) is not None)


def _split_folder(folder: Path, split: str | None) -> Path | None:
    """Return the folder of a split's pictures: images/train, train/images or train."""
    places = (folder / "images" / str(split), folder / str(split) / "images", folder / str(split))
    return next((place for place in places if place.is_dir()), None)
