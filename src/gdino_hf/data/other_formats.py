"""Recognizing data sets in formats that are not read here, to say what they are and how to convert them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ..model.printable import printable

_HEAD_BYTES = 4096
# Files looked at in a folder before giving up; label files come first or not at all.
_MOST_FILES = 200
_YAMLS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")

_CONVERSIONS = {
    "YOLO": "DetectionDataset.from_yolo(images, labels, 'data.yaml')",
    "Pascal VOC": "DetectionDataset.from_pascal_voc(images, xmls)",
}


def describe_other_format(path: Path) -> str | None:
    """Say that a file or folder holds a data set of a known format that is not read here.

    Args:
        path: A file or folder that holds no annotations this package reads.

    Returns:
        A sentence with the format and what to do; None if the format is unknown.
    """
    try:
        name = _file_format(path) if path.is_file() else _folder_format(path)
    except OSError:
        return None
    if name is None:
        return None
    way = _CONVERSIONS.get(name)
    remedy = f", or convert them with supervision: {way}.as_coco(annotations_path='train.json')" if way else ""
    return f"{printable(path)} holds {name} annotations, which are not read here; export them as COCO json{remedy}."


def _folder_format(folder: Path) -> str | None:
    if not folder.is_dir():
        return None
    if any((place / name).is_file() for place in (folder, folder.parent) for name in _YAMLS):
        return "YOLO"
    places = [folder, *(folder / name for name in ("labels", "Annotations", "annotations", "train", "train/labels"))]
    for place in places:
        for file in islice(_files(place), _MOST_FILES):
            name = _file_format(file)
            if name is not None:
                return name
    return None


def _files(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.is_file():
                yield path
            elif folder.name == "labels" and path.is_dir():
                # YOLO's usual folders: labels/train, labels/val.
                yield from islice((file for file in sorted(path.iterdir()) if file.is_file()), _MOST_FILES)


def _file_format(file: Path) -> str | None:
    kind = file.suffix.lower()
    if kind == ".tfrecord":
        return "TFRecord"
    if kind not in (".yaml", ".yml", ".txt", ".labels", ".xml", ".csv", ".json"):
        return None
    with file.open("rb") as stream:
        head = stream.read(_HEAD_BYTES).decode("utf-8", errors="replace").lstrip("\ufeff \r\n\t")
    if kind in (".yaml", ".yml"):
        return "YOLO" if "names:" in head and ("train:" in head or "nc:" in head or "path:" in head) else None
    if kind == ".labels" or (kind == ".txt" and _is_yolo(head)):
        return "YOLO"
    if kind == ".xml" and "<annotation" in head:
        return "Pascal VOC"
    if kind == ".csv" and all(word in head.lower() for word in ("filename", "class", "xmin")):
        return "CSV"
    if kind == ".json":
        if '"shapes"' in head and ('"imagePath"' in head or '"version"' in head):
            return "LabelMe"
        if head.startswith("[") and '"image"' in head and '"annotations"' in head and '"coordinates"' in head:
            return "CreateML"
    return None


def _is_yolo(head: str) -> bool:
    """Whether lines are a class number with the four or more fractions of a box or outline."""
    lines = [line.split() for line in head.splitlines() if line.strip()]
    # The last line may have been cut off.
    lines = lines[:-1] if len(head) >= _HEAD_BYTES else lines
    return bool(lines) and all(_is_yolo_line(line) for line in lines)


def _is_yolo_line(words: list[str]) -> bool:
    try:
        numbers = [float(word) for word in words[1:]]
    except ValueError:
        return False
    return words[0].isdecimal() and len(numbers) >= 4 and all(-0.1 <= number <= 1.1 for number in numbers)
