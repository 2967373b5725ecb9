"""Recognizing annotations that are not read as they are, to say what they are and what to do."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from ..model.printable import printable
from .yolo_lines import is_yolo_text

_HEAD_BYTES = 4096
# Files looked at in a folder before giving up; annotations come first or not at all.
_MOST_FILES = 200
# Formats of a whole data set, and those with a file for each picture, whose folder is read.
_NOT_READ, _OF_ONE_PICTURE = ("TFRecord", "CSV"), ("YOLO", "Pascal VOC", "LabelMe")


def describe_other_format(path: Path) -> str | None:
    """Say that a file or folder holds a data set of a known format that is not read here, or a part of one.

    Args:
        path: A file or folder that holds no annotations this package reads.

    Returns:
        A sentence with the format and what to do; None if the format is unknown.
    """
    try:
        name = _file_format(path) if path.is_file() else _folder_format(path)
    except OSError:
        return None
    if name in _OF_ONE_PICTURE:
        return f"{printable(path)} holds {name} annotations of one picture; give the folder of the data set."
    if name is not None:
        return f"{printable(path)} holds {name} annotations, which are not read here; export them as COCO json."
    return None


def _folder_format(folder: Path) -> str | None:
    places = [folder, *(folder / name for name in ("annotations", "train"))]
    files = [file for place in places if place.is_dir() for file in islice(sorted(place.iterdir()), _MOST_FILES)]
    found = (_file_format(file) for file in files if file.is_file())
    return next((name for name in found if name in _NOT_READ), None)


def _file_format(file: Path) -> str | None:
    kind = file.suffix.lower()
    if kind == ".tfrecord":
        return "TFRecord"
    if kind not in (".txt", ".xml", ".csv", ".json"):
        return None
    with file.open("rb") as stream:
        head = stream.read(_HEAD_BYTES).decode("utf-8", errors="replace").lstrip("\ufeff \r\n\t")
    if kind == ".txt":
        return "YOLO" if is_yolo_text(head) else None
    if kind == ".csv":
        return "CSV" if all(word in head.lower() for word in ("filename", "class", "xmin")) else None
    if kind == ".xml":
        return "Pascal VOC" if "<annotation" in head else None
    return "LabelMe" if '"shapes"' in head and ('"imagePath"' in head or '"version"' in head) else None
