"""Where the images of an annotation file lie, and that none of them lies outside the data set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..model.text_prompt import shorten
from .annotation_options import AnnotationOptions
from .rows import is_file, parse_text

# Folders that hold only the annotations of a data set, whose images lie around them.
_ANNOTATION_FOLDERS = ("annotations", "ann")


class OutsideError(ValueError):
    """A path of an annotation file leads outside the data set's folder."""


class ImagePaths:
    """Finds the images of an annotation file, one by one.

    Args:
        annotations: The annotation file.
        images: Folder of the images given by the user, which is then the only one searched; None searches the usual
            places beside the annotation file.
        options: Conventions of the file, which say whether paths may lead outside.
    """

    def __init__(self, annotations: str | Path, images: str | Path | None, options: AnnotationOptions) -> None:
        self.folders = image_folders(annotations, images)
        self._roots = None if options.paths == "anywhere" else _roots(annotations, self.folders)

    def find(self, name: str) -> Path:
        """Return the path of an image by its name in the annotations; the first place if no file exists.

        Raises:
            OutsideError: The path leads outside the data set's folder, as absolute paths and ".." can. Links inside
                the folder are followed: whoever made the folder made them too.
        """
        return self._first([image_path(folder, name) for folder in self.folders], name)

    def find_coco(self, image: Mapping[str, Any]) -> Path:
        """Return the path of an image of a COCO or LVIS file.

        Args:
            image: Entry of the file's "images". LVIS has no "file_name" but a "coco_url", whose last two parts are
                COCO's folder and file name; images may lie in the folder directly or in COCO's sub-folders.

        Returns:
            The path; the file need not exist.

        Raises:
            ValueError: The entry has neither a "file_name" nor a "coco_url", or the path leads outside.
        """
        if "file_name" in image or not isinstance(image.get("coco_url"), str):
            return self.find(parse_text(image.get("file_name"), "its file_name"))
        address = PurePosixPath(parse_text(image["coco_url"], "its coco_url"))
        names = (str(PurePosixPath(address.parent.name, address.name)), address.name)
        return self._first([image_path(folder, name) for folder in self.folders for name in names], address.name)

    def _first(self, paths: Sequence[Path], name: str) -> Path:
        if self._roots is None:
            return first_existing(paths)
        inside = [path for path in map(_resolved, paths) if _is_inside(path, self._roots)]
        if not inside:
            raise OutsideError(f"its path {shorten(name)} leads outside the data set's folder")
        return first_existing(inside)


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
        The folder of `image_folder`. By default also the file's own folder, and folders of the file's name beside it
        and in `images`; for a file in a folder `annotations`, the same around that folder.
    """
    first = image_folder(annotations, images)
    if images is not None:
        return [first]
    path = Path(annotations)
    places = [path.parent, *([path.parent.parent] if path.parent.name in _ANNOTATION_FOLDERS else [])]
    # COCO's own files are called instances_val2017.json beside a folder val2017.
    stems = dict.fromkeys((path.stem, path.stem.rpartition("_")[2]))
    folders = [first]
    for place in places:
        folders += [place, place / "images", *(place / part / stem for part in ("", "images") for stem in stems)]
    # What does not exist need not be searched for every image.
    return [first, *(folder for folder in dict.fromkeys(folders) if folder != first and folder.is_dir())]


def first_existing(paths: Sequence[Path]) -> Path:
    """Return the first path that is a file, or the first one if none is."""
    return next((path for path in paths if is_file(path)), paths[0])


def image_path(folder: str | Path, name: str) -> Path:
    """Return the path of an image named in an annotation file.

    Args:
        folder: Folder of the images.
        name: The image's name in the annotations. Some tools put the folder's own name in front of it, or write
            backslashes; both are resolved.

    Returns:
        The path; the file need not exist.
    """
    path = Path(folder) / name
    if "\\" in name and not is_file(path):
        return image_path(folder, name.replace("\\", "/"))
    if Path(name).parts[:1] == (Path(folder).name,) and not is_file(path):
        beside = Path(folder).parent / name
        return beside if is_file(beside) else path
    return path


def _roots(annotations: str | Path, folders: Sequence[Path]) -> list[str]:
    """Return the folders that a data set consists of, as absolute paths."""
    return [os.path.abspath(folder) for folder in (Path(annotations).parent, *folders)]


def _resolved(path: Path) -> Path:
    """Return the path without "..", so that the path that is opened is the one that was judged."""
    return Path(os.path.normpath(path)) if ".." in path.parts else path


def _is_inside(path: Path, roots: Sequence[str]) -> bool:
    place = os.path.abspath(path)
    return any(place.startswith(root.rstrip(os.sep) + os.sep) for root in roots)
