"""Recognizing the form of a data set: which reader a file, a folder, an address or an id on the Hub belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .createml_file import CreateMLFile
from .image_folder import ImageFolder
from .labelme_folder import LabelMeFolder, labelme_files
from .picture_sets import PictureSet, files_of
from .places import SPLIT_NAMES, is_address, is_there, split_of
from .rows import is_file
from .voc_folder import VocFolder, voc_root
from .yolo_folder import YAMLS, YoloFolder, names_file
from .yolo_lines import is_yolo_text

READERS: Mapping[str, type[PictureSet]] = {
    reader.form: reader for reader in (YoloFolder, VocFolder, CreateMLFile, LabelMeFolder, ImageFolder)
}
"""Reader of each form whose annotations lie picture by picture."""

TITLES = {
    "coco": "COCO json",
    "odvg": "ODVG json lines",
    **{form: reader.title for form, reader in READERS.items()},
}
"""What each form is called in messages."""

_SPLIT_FOLDERS = tuple(name for names in SPLIT_NAMES.values() for name in names)
# Label files looked at before a folder is taken for none of YOLO's.
_MOST_LABELS = 20


@dataclass(frozen=True)
class KnownSet:
    """A data set whose form was recognized.

    Attributes:
        form: Its form, a key of `READERS`.
        base: What its reader takes: a file, a folder, an address or an id.
        splits: Its own names of the splits "train", "val" and "test" that it has; empty if it has no splits.
        split: The split that the path itself stands for, such as an export's train/; None without one.
    """

    form: str
    base: str
    splits: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None


def known_set(place: str) -> KnownSet | None:
    """Recognize a data set whose annotations are not one JSON file.

    Args:
        place: A file, a folder, an address or an id on the Hub, without a split.

    Returns:
        The data set; None if it is of none of these forms.

    Raises:
        ValueError: It is one of them, but cannot be read.
    """
    form, base, split = _recognized(place)
    if form is None:
        return None
    return KnownSet(form, base, READERS[form].splits(base), split)


def _recognized(place: str) -> tuple[str | None, str, str | None]:
    if is_address(place):
        return None, place, None
    path = Path(place).expanduser()
    if is_file(path):
        return _file_form(path), str(path), None
    if not is_there(path):
        return None, place, None
    for name in YAMLS:
        if is_file(path / name) and _is_yolo_yaml(path / name):
            return "yolo", str(path / name), None
        beside = path.parent / name
        if is_file(beside) and split_of(path.name) and (path / "images").is_dir() and _is_yolo_yaml(beside):
            return "yolo", str(beside), split_of(path.name)
    root = voc_root(path)
    if root is not None or files_of(path, ".xml"):
        return ("voc", str(root or path), None) if root is not None or _is_voc(path) else (None, place, None)
    if _has_yolo_labels(path):
        return "yolo", str(path), None
    return ("labelme" if labelme_files(path) else None), str(path), None


def _file_form(path: Path) -> str | None:
    return "yolo" if path.suffix.lower() in (".yaml", ".yml") and _is_yolo_yaml(path) else None


def _is_yolo_yaml(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(2**16)
    except OSError:
        return False
    keys = {match.group(1) for match in re.finditer(rb"(?m)^[\"']?(\w+)[\"']?\s*:", head)}
    return b"names" in keys


def _is_voc(folder: Path) -> bool:
    for path in files_of(folder, ".xml")[:1]:
        with path.open("rb") as file:
            return b"<annotation" in file.read(4096)
    return False


def _has_yolo_labels(folder: Path) -> bool:
    """Return whether a folder has label files beside pictures or in labels/, with a list of names or without."""
    places = [folder, folder / "labels", folder / "train", folder / "train" / "labels"]
    places += [folder / "labels" / name for name in _SPLIT_FOLDERS]
    texts = [path for place in places for path in files_of(place, ".txt")]
    if names_file(folder) is not None and len(texts) > 1:
        texts = [path for path in texts if path != names_file(folder)]
    return any(_is_yolo_file(path) for path in texts[:_MOST_LABELS])


def _is_yolo_file(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return is_yolo_text(file.read(4096))
    except OSError:
        return False
