"""Folders of training, validation and test pictures, laid out as Ultralytics and RF-DETR document it.

The pictures lie in the folder themselves, under plain names, so that it can be moved, packed and handed to any trainer.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from ..data.annotation_options import DEFAULT_OPTIONS, AnnotationOptions
from ..data.dataset_pictures import dataset_pictures
from ..data.formats import open_dataset
from ..data.stored_pictures import content_or_path
from ..detection import coco_exchange, yolo_exchange
from ..detection.detections import Detections
from ..error_text import reason
from ..model.picture_formats import picture_format
from ..model.picture_metadata import ORIENTATION
from ..model.picture_pixels import load_image
from ..model.printable import printable
from ..whole_files import whole_folder
from .label_results import shard_rows
from .label_settings import read_manifest
from .label_store import LabelStore, finished_shards
from .shard_labels import PictureReader
from .source_items import SourceItem

SHARES = (0.8, 0.1, 0.1)
"""Parts of the pictures for training, validation and test by default."""

LAYOUTS = {"yolo": ("train", "val", "test"), "coco": ("train", "valid", "test")}
"""Names of the three splits in each layout."""

# What other readers decode, with the ending they expect; pictures of other formats are stored as PNG.
_ENDINGS = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",), "BMP": (".bmp",)}
_SUPERCATEGORY = "object"
_LONGEST_STEM = 120


@dataclass(frozen=True)
class SplitPicture:
    """A picture that goes into a split.

    Attributes:
        name: Its path or address, of which the file keeps the last part.
        read: Function that returns its content or its path.
        found: Its boxes.
        crowd: (N,) whether each box marks a region of many objects.
    """

    name: str
    read: Callable[[], bytes | str | Path]
    found: Detections
    crowd: Sequence[bool] = ()


@dataclass(frozen=True)
class SplitSummary:
    """What a folder of splits holds.

    Attributes:
        folder: The folder.
        pictures: Number of pictures of each split that has any.
        boxes: Number of boxes of each of these.
        left_out: Name and reason of each picture that could not be read.
    """

    folder: Path
    pictures: dict[str, int]
    boxes: dict[str, int]
    left_out: dict[str, str]


def split_labels(
    store: LabelStore,
    out: str | Path,
    layout: str,
    shares: Sequence[float] = SHARES,
    *,
    seed: int = 0,
    keep_empty: bool = True,
) -> SplitSummary:
    """Divide what a finished run of labelling found into a folder of splits.

    Args:
        store: Files of the run.
        out, layout, shares, seed: See `write_splits`.
        keep_empty: Whether pictures in which nothing was found belong to it.

    Raises:
        OSError: The folder cannot be written.
        ValueError: The run is not finished, or an argument cannot be used.
    """
    manifest = read_manifest(store)
    if manifest is None or not manifest.get("finished"):
        raise ValueError(f"{store.folder} holds no finished run; label the pictures first.")
    names = [entry["label"] for entry in manifest["settings"]["vocabulary"]["labels"]]
    read = PictureReader()

    def pictures() -> Iterator[SplitPicture]:
        for row in shard_rows(store, sorted(finished_shards(store))):
            if row.found is not None and (keep_empty or len(row.found)):
                yield SplitPicture(row.source, partial(read, SourceItem(row.source, row.place)), row.detections())

    return write_splits(pictures, names, out, layout, shares, seed=seed)


def split_dataset(
    place: str | Path,
    out: str | Path,
    layout: str,
    shares: Sequence[float] = SHARES,
    *,
    images: str | Path | None = None,
    options: AnnotationOptions = DEFAULT_OPTIONS,
    seed: int = 0,
) -> SplitSummary:
    """Divide a data set of any form, such as an export of Label Studio, into a folder of splits.

    Args:
        place: The data set as for `open_dataset`.
        out, layout, shares, seed: See `write_splits`.
        images: Folder of the pictures; found as `open_dataset` finds it by default.
        options: Conventions of the data set.

    Raises:
        OSError: The folder cannot be written.
        ValueError: The data set cannot be read or has captions, or an argument cannot be used.
    """
    _, names = open_dataset(place, images, options=options)
    if names is None:
        raise ValueError(f"{printable(place)} has captions in place of names; give a data set with names.")
    number = {name: index for index, name in enumerate(names)}

    def pictures() -> Iterator[SplitPicture]:
        for each in dataset_pictures(place, images, options):
            row = each.row
            size = (row["width"], row["height"]) if row["width"] else each.open().size
            boxes = np.asarray(row["boxes"], np.float32).reshape(-1, 4)
            labels = np.array([number[name] for name in row["names"]], np.int64)
            found = Detections(boxes, np.ones(len(boxes), np.float32), labels, tuple(names), size, source=each.name)
            yield SplitPicture(each.name, partial(content_or_path, each.picture), found, row["crowd"])

    return write_splits(pictures, names, out, layout, shares, seed=seed)


def write_splits(
    pictures: Callable[[], Iterable[SplitPicture]],
    names: Sequence[str],
    out: str | Path,
    layout: str,
    shares: Sequence[float] = SHARES,
    *,
    seed: int = 0,
) -> SplitSummary:
    """Write a folder of splits, whole or not at all; an earlier one is replaced.

    "yolo" is Ultralytics' layout: data.yaml with path, train, val, test and names, images/SPLIT and labels/SPLIT.
    "coco" is that of RF-DETR and Roboflow's exports: train, valid and test, each with its pictures and
    _annotations.coco.json. Pictures that are stored turned are written upright, since not all readers turn them.

    Args:
        pictures: Function that returns all pictures, in the same order each time it is called.
        names: All labels.
        out: The folder.
        layout: "yolo" or "coco".
        shares: Parts for training, validation and test, which add up to 1.
        seed: Which pictures go where is drawn with it.

    Raises:
        OSError: The folder cannot be written.
        ValueError: The layout is unknown, the shares do not add up, or a split would be empty.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"There is no layout {layout!r}; choose from {', '.join(LAYOUTS)}.")
    counts = _counts(sum(1 for _ in pictures()), shares)
    order = np.random.default_rng(seed).permutation(np.repeat(np.arange(3), counts)).tolist()
    used = [split for split, count in zip(LAYOUTS[layout], counts, strict=True) if count]
    left_out: dict[str, str] = {}
    with whole_folder(out) as folder:
        kind = _YoloSplit if layout == "yolo" else _CocoSplit
        splits = {name: kind(folder, name, names) for name in used}
        for picture, place in zip(pictures(), order, strict=True):
            try:
                splits[LAYOUTS[layout][place]].add(picture)
            except (OSError, ValueError) as error:
                left_out[picture.name] = reason(error, name_file=True)
        for split in splits.values():
            split.finish()
        if layout == "yolo":
            _write_yaml(folder, Path(out), used, names)
    return SplitSummary(
        Path(out),
        {name: split.pictures for name, split in splits.items()},
        {name: split.boxes for name, split in splits.items()},
        left_out,
    )


def _counts(total: int, shares: Sequence[float]) -> list[int]:
    """Return the number of pictures of each split: the shares rounded, and at least one where there is a share.

    Raises:
        ValueError: The shares cannot be used, or there are too few pictures.
    """
    if len(shares) != 3 or any(not 0 <= share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        given = ", ".join(f"{share:g}" for share in shares)
        raise ValueError(f"The shares are {given}; give three numbers in 0..1 that add up to 1.")
    if not shares[0]:
        raise ValueError("The share for training is 0; give one above it.")
    if total < sum(share > 0 for share in shares):
        raise ValueError(f"There are {total} pictures for {sum(share > 0 for share in shares)} splits; give fewer.")
    counts = [max(1, round(total * share)) if share else 0 for share in shares]
    counts[int(np.argmax(counts))] += total - sum(counts)
    return counts


class _Split:
    """One split of a folder."""

    def __init__(self, pictures: Path, names: Sequence[str]) -> None:
        self.names, self.pictures, self.boxes = tuple(names), 0, 0
        self._folder = pictures
        self._taken: set[str] = set()
        pictures.mkdir(parents=True)

    def add(self, picture: SplitPicture) -> None:
        """Write a picture and its boxes.

        Raises:
            OSError: It cannot be read or written.
            ValueError: It cannot be decoded, or has changed since its boxes were made.
        """
        content = picture.read()
        content = content if isinstance(content, bytes) else Path(content).read_bytes()
        image = load_image(content)
        if image.size != picture.found.size:
            raise ValueError("it was changed after it was labelled")
        ending, stem = _stored(content, PurePath(picture.name).suffix.lower()), self._stem(picture.name)
        path = self._folder / f"{stem}{ending or '.png'}"
        if ending is None:
            Image.Image.save(image, path, "PNG")
        else:
            path.write_bytes(content)
        self.write(picture, path.name, stem)
        self.pictures += 1
        self.boxes += len(picture.found)

    def write(self, picture: SplitPicture, file_name: str, stem: str) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Write what follows the last picture."""

    def _stem(self, name: str) -> str:
        """Return a plain file name without ending that no other picture of the split has."""
        last = PurePath(name.partition("?")[0] if "://" in name else name).stem or "picture"
        base = stem = re.sub(r"[^\w.-]", "_", last)[:_LONGEST_STEM]
        number = 1
        while stem.lower() in self._taken:
            number += 1
            stem = f"{base}-{number}"
        self._taken.add(stem.lower())
        return stem


class _YoloSplit(_Split):
    def __init__(self, folder: Path, name: str, names: Sequence[str]) -> None:
        super().__init__(folder / "images" / name, names)
        self._labels = folder / "labels" / name
        self._labels.mkdir(parents=True)

    def write(self, picture: SplitPicture, file_name: str, stem: str) -> None:
        lines = yolo_exchange.label_lines(picture.found, scores=False)
        # A class number says nothing of crowds.
        lines = [line for place, line in enumerate(lines) if not (picture.crowd and picture.crowd[place])]
        (self._labels / f"{stem}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


class _CocoSplit(_Split):
    def __init__(self, folder: Path, name: str, names: Sequence[str]) -> None:
        super().__init__(folder / name, names)
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def write(self, picture: SplitPicture, file_name: str, stem: str) -> None:
        number = len(self._images) + 1
        self._images.append(coco_exchange.image_row(picture.found, number, file_name))
        rows = coco_exchange.annotation_rows(picture.found, number, len(self._annotations) + 1)
        for place, row in enumerate(rows):
            row["iscrowd"] = int(bool(picture.crowd and picture.crowd[place]))
        self._annotations += rows

    def finish(self) -> None:
        # RF-DETR and Roboflow read the names of categories that have a supercategory.
        categories = [{**row, "supercategory": _SUPERCATEGORY} for row in coco_exchange.category_rows(self.names)]
        content = {
            "info": {"description": "written by gdino-hf"},
            "licenses": [],
            "images": self._images,
            "annotations": self._annotations,
            "categories": categories,
        }
        text = json.dumps(content, ensure_ascii=False) + "\n"
        (self._folder / "_annotations.coco.json").write_text(text, encoding="utf-8")


def _write_yaml(folder: Path, out: Path, used: Sequence[str], names: Sequence[str]) -> None:
    import yaml

    # Ultralytics takes a relative path for one inside its own folder of data sets.
    content: dict[str, Any] = {"path": str(out.absolute())}
    # It demands a validation split; without one, that of training stands in.
    content |= {"train": "images/train", "val": f"images/{'val' if 'val' in used else 'train'}"}
    content |= {"test": "images/test"} if "test" in used else {}
    content |= {"nc": len(names), "names": dict(enumerate(names))}
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
    (folder / "data.yaml").write_text(text, encoding="utf-8")


def _stored(content: bytes, given: str) -> str | None:
    """Return the ending for a picture's file; None if it cannot be stored as it is, because few decode it or turn it.

    Args:
        content: The picture.
        given: Ending of the name that it has.
    """
    endings = _ENDINGS.get(str(picture_format(content, content[-64:])))
    if endings is None:
        return None
    with Image.open(io.BytesIO(content)) as image:
        if image.getexif().get(ORIENTATION, 1) not in (0, 1):
            return None
    return given if given in endings else endings[0]
