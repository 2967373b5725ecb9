"""The content of a COCO file as it lies on disk, and the paths of its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from .rows import image_path, is_file, parse_text, read_json

_LISTS = ("images", "annotations", "categories")


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


def image_folders(annotations: str | Path, images: str | Path | None) -> list[Path]:
    """Return the folders in which an annotation file's images are looked for, one by one.

    Args:
        annotations: The annotation file.
        images: Folder given by the user, which is then the only one.

    Returns:
        The folder of `image_folder`, and by default also the file's own folder and one beside it of the file's name.
    """
    first = image_folder(annotations, images)
    if images is not None:
        return [first]
    path = Path(annotations)
    return list(dict.fromkeys([first, path.parent, path.parent / path.stem]))


def first_existing(paths: Sequence[Path]) -> Path:
    """Return the first path that is a file, or the first one if none is."""
    return next((path for path in paths if is_file(path)), paths[0])


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
