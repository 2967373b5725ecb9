"""COCO detection files as a `datasets.Dataset` whose images are decoded when a row is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..model.text_prompt import shorten
from .rows import (
    LARGEST_SIDE,
    clip_box,
    image_path,
    is_file,
    make_dataset,
    make_stream,
    parse_box,
    parse_integer,
    parse_text,
    read_json,
)

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_LISTS = ("images", "annotations", "categories")


def read_coco(
    annotations: str | Path, images: str | Path | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """Read a COCO detection file; images are decoded only when a row is read.

    Args:
        annotations: The COCO json file; its boxes are absolute xywh.
        images: Folder of the images; by default `images` beside the json file, or else the json file's own folder.
        streaming: Create rows one by one while iterating. The json file is still read as a whole, since its format
            does not allow otherwise; for annotations larger than memory use ODVG.

    Returns:
        One row per image, in file order: `image` (PIL), `image_id`, `width`, `height`, `boxes` ((N, 4) xyxy in
        pixels, clipped to the image), `names` (N) and `crowd` (N). Boxes without area are dropped.

    Raises:
        ValueError: The file is not a COCO detection file, holds something that cannot be used, or lists an image file
            that does not exist. `check_dataset` lists everything to repair.
    """
    return open_coco(annotations, images, streaming)[0]


def open_coco(
    annotations: str | Path, images: str | Path | None = None, streaming: bool = False
) -> tuple[Dataset | IterableDataset, list[str]]:
    """Return the rows and the category names of a COCO file, reading it only once.

    Args:
        annotations: The COCO json file.
        images: Folder of the images, as in `read_coco`.
        streaming: Whether to create rows while iterating, as in `read_coco`.

    Returns:
        The results of `read_coco` and of `category_names`.

    Raises:
        ValueError: The file cannot be used, as in `read_coco`.
    """
    folder, content = str(image_folder(annotations, images)), load_coco(annotations)
    listed = list(names_by_id(content, annotations).values())
    if streaming:
        return make_stream(_read_rows, False, {"annotations": str(annotations), "folder": folder}), listed
    return make_dataset(_rows(content, annotations, folder), captions=False), listed


def category_names(annotations: str | Path) -> list[str]:
    """Return the category names of a COCO file, in the order of their ids.

    Args:
        annotations: The COCO json file.

    Returns:
        The names.

    Raises:
        ValueError: The file is not a COCO detection file, or a category has no name.
    """
    return list(names_by_id(load_coco(annotations), annotations).values())


def image_folder(annotations: str | Path, images: str | Path | None) -> Path:
    """Return the folder that holds an annotation file's images.

    Args:
        annotations: The annotation file.
        images: Folder given by the user, which takes precedence; None looks for one.

    Returns:
        The given folder, else `images` beside the annotation file if it exists, else the file's own folder.
    """
    if images is not None:
        return Path(images)
    beside = Path(annotations).parent / "images"
    return beside if beside.is_dir() or not Path(annotations).parent.is_dir() else Path(annotations).parent


def load_coco(annotations: str | Path) -> dict[str, Any]:
    """Load a COCO file and check that its three lists are lists of dicts; the entries themselves are not checked.

    Args:
        annotations: The COCO json file.

    Returns:
        The parsed content.

    Raises:
        ValueError: The file is not a COCO detection file.
    """
    content = read_json(annotations, "COCO json")
    if not isinstance(content, dict):
        raise ValueError(
            f"{annotations} is not a COCO detection file: it holds a {type(content).__name__}, not a dict."
        )
    missing = [name for name in _LISTS if name not in content]
    if missing:
        raise ValueError(f"{annotations} is not a COCO detection file: it has no {', '.join(missing)}.")
    for name in _LISTS:
        if not isinstance(content[name], list) or not all(isinstance(item, dict) for item in content[name]):
            raise ValueError(f"{annotations} is not a COCO detection file: its {name} are not a list of dicts.")
    return content


def coco_image_path(image: Mapping[str, Any], folder: str | Path) -> Path:
    """Return the path of an image of a COCO or LVIS file.

    Args:
        image: Entry of the file's "images". LVIS has no "file_name" but a "coco_url", whose last two parts are COCO's
            folder and file name.
        folder: Folder of the images; they may lie in it directly or in COCO's sub-folders.

    Returns:
        The path; the file need not exist.

    Raises:
        ValueError: The entry has neither a "file_name" nor a "coco_url".
    """
    if "file_name" in image or not isinstance(image.get("coco_url"), str):
        return image_path(folder, parse_text(image.get("file_name"), "its file_name"))
    address = PurePosixPath(parse_text(image["coco_url"], "its coco_url"))
    by_split = image_path(folder, str(PurePosixPath(address.parent.name, address.name)))
    return by_split if is_file(by_split) else Path(folder) / address.name


def names_by_id(content: Mapping[str, Any], annotations: str | Path) -> dict[int, str]:
    """Return the category names of a COCO file by category id.

    Args:
        content: Content of the file, from `load_coco`.
        annotations: Path of the file, for error messages.

    Returns:
        Category id to name, in ascending order of ids.

    Raises:
        ValueError: A category has no integer id, or no name.
    """
    names = {}
    for category in content["categories"]:
        try:
            names[parse_integer(category.get("id"), "its id", -LARGEST_SIDE)] = parse_text(
                category.get("name"), "its name"
            )
        except ValueError as error:
            raise ValueError(f"A category of {annotations} cannot be used: {error}; repair it.") from None
    return dict(sorted(names.items()))


def _read_rows(annotations: str, folder: str) -> Iterator[dict[str, Any]]:
    yield from _rows(load_coco(annotations), annotations, folder)


def _rows(content: Mapping[str, Any], annotations: str | Path, folder: str) -> Iterator[dict[str, Any]]:
    names = names_by_id(content, annotations)
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        number = annotation.get("image_id")
        by_image[number if isinstance(number, (int, float)) else None].append(annotation)
    for place, image in enumerate(content["images"]):
        try:
            row = _row(image, by_image, names)
            path = coco_image_path(image, folder)
        except ValueError as error:
            raise ValueError(f"Image {place} of {annotations} cannot be used: {error}; repair it.") from None
        if not is_file(path):
            raise ValueError(f"{annotations} lists the image {path}, which does not exist; pass images=FOLDER.")
        yield {"image": str(path), **row}


def _row(
    image: Mapping[str, Any], by_image: Mapping[Any, list[dict[str, Any]]], names: Mapping[int, str]
) -> dict[str, Any]:
    number = parse_integer(image.get("id"), "its id", -(2**63))
    width = parse_integer(image.get("width"), "its width", 1, LARGEST_SIDE)
    height = parse_integer(image.get("height"), "its height", 1, LARGEST_SIDE)
    row: dict[str, Any] = {"image_id": number, "width": width, "height": height, "boxes": [], "names": [], "crowd": []}
    for annotation in by_image.get(number, ()):
        try:
            box = clip_box(parse_box(annotation.get("bbox"), "xywh"), width, height)
            category = annotation.get("category_id")
            if not isinstance(category, (int, float)) or category not in names:
                raise ValueError(f"category_id {shorten(category)} is not among the file's categories")
        except ValueError as error:
            raise ValueError(f"in annotation {shorten(annotation.get('id'))}, {error}") from None
        if box is not None:
            row["boxes"].append(box)
            row["names"].append(names[int(category)])
            row["crowd"].append(bool(annotation.get("iscrowd", 0)))
    return row
