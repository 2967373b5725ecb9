"""Recognizing the form of a data set: which reader a file, a folder, an address or an id on the Hub belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..model.picture_formats import PICTURE_SUFFIXES
from .createml_file import CreateMLFile
from .image_folder import ImageFolder
from .label_studio_file import LabelStudioFile
from .labelme_folder import LabelMeFolder, has_labelme_files
from .object_tables import HUB, SAVED, ObjectTable
from .picture_sets import PictureSet, files_of
from .places import SPLIT_NAMES, is_address, is_there, split_of
from .rows import is_file
from .tar_shards import TarShards, shard_paths
from .voc_folder import VocFolder, voc_root
from .yolo_folder import YAMLS, YoloFolder, names_file
from .yolo_lines import is_yolo_text

_READERS: tuple[type[PictureSet], ...] = (
    YoloFolder,
    VocFolder,
    CreateMLFile,
    LabelMeFolder,
    LabelStudioFile,
    ImageFolder,
    ObjectTable,
    TarShards,
)
READERS: Mapping[str, type[PictureSet]] = {reader.form: reader for reader in _READERS}
"""Reader of each form whose annotations lie picture by picture."""

TITLES = {
    "coco": "COCO json",
    "odvg": "ODVG json lines",
    **{form: reader.title for form, reader in READERS.items()},
}
"""What each form is called in messages."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")
# Names with these endings are files, which ids on the Hub hardly have.
_FILES = (
    *PICTURE_SUFFIXES,
    *(".json", ".jsonl", ".ndjson", ".yaml", ".yml", ".xml", ".csv", ".tsv", ".txt", ".parquet", ".arrow"),
    *(".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar"),
)
_TABLE, _METADATA = ".parquet", "metadata.parquet"
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


def form_of(place: str) -> str | None:
    """Return the form of a data set as `known_set` does, without looking for its splits, which may take long."""
    return _recognized(place)[0]


def _recognized(place: str) -> tuple[str | None, str, str | None]:
    if place.startswith(HUB):
        return "huggingface", place, None
    path = Path(place).expanduser()
    if not path.is_dir() and shard_paths(place):
        return "webdataset", place, None
    if is_address(place):
        return None, place, None
    if is_file(path):
        return _file_form(path), str(path), None
    if not is_there(path):
        return ("huggingface" if is_hub_id(place) else None), place, None
    if any(is_file(path / name) for name in SAVED):
        return "huggingface", str(path), None
    for name in YAMLS:
        if is_file(path / name) and _is_yolo_yaml(path / name):
            return "yolo", str(path / name), None
        beside = path.parent / name
        if is_file(beside) and split_of(path.name) and (path / "images").is_dir() and _is_yolo_yaml(beside):
            return "yolo", str(beside), split_of(path.name)
    if _has_tables(path):
        return "huggingface", str(path), None
    root = voc_root(path)
    if root is not None or files_of(path, ".xml"):
        return ("voc", str(root or path), None) if root is not None or _is_voc(path) else (None, place, None)
    if shard_paths(str(path)):
        return "webdataset", str(path), None
    if _has_yolo_labels(path):
        return "yolo", str(path), None
    return ("labelme" if has_labelme_files(path) else None), str(path), None


def is_hub_id(place: str) -> bool:
    """Return whether a place that does not exist on disk can be the id of a data set on the Hub: USER/NAME.

    It is a missing path if it is called like a file, or if the folder before the slash exists.
    """
    if _HUB_ID.fullmatch(place) is None or place.lower().endswith(_FILES):
        return False
    return not is_there(Path(place).parts[0])


def _file_form(path: Path) -> str | None:
    kind = path.suffix.lower()
    if kind in (".yaml", ".yml") and _is_yolo_yaml(path):
        return "yolo"
    return "huggingface" if kind == _TABLE else None


def _is_yolo_yaml(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(2**16)
    except OSError:
        return False
    keys = {match.group(1) for match in re.finditer(rb"(?m)^[\"']?(\w+)[\"']?\s*:", head)}
    return bool(keys & {b"names", b"train", b"val"})


def _has_tables(folder: Path) -> bool:
    """Return whether a folder, its data/ or a split's folder has Parquet files, or metadata of an imagefolder."""
    for place in (folder, folder / "data", *(folder / name for name in _SPLIT_FOLDERS)):
        if files_of(place, _TABLE) or is_file(place / _METADATA):
            return True
    return False


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
