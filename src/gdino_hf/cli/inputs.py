"""Inputs named on the command line: images in files, folders, globs and URLs; labels in text and files."""

from __future__ import annotations

import glob
import os
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gdino_hf.data.folder_files import sort_files
from gdino_hf.error_text import reason
from gdino_hf.model.picture_formats import READABLE
from gdino_hf.model.text_prompt import shorten, split_labels

from .errors import UsageError

LONGEST_NAME = 100


@dataclass(frozen=True)
class ImageInput:
    """One image to process.

    Attributes:
        source: Path or URL, as shown to the user.
        name: Relative path under which its results are filed; for an image in a folder, its path inside that folder.
        error: Reason why the image cannot exist; None if it seems to exist.
    """

    source: str
    name: str
    error: str | None = None


def is_url(text: str) -> bool:
    """Return whether the text is a web address."""
    return text.lower().startswith(("http://", "https://"))


def collect_images(
    arguments: Sequence[str], exclude: Path | None = None, left_out: list[str] | None = None
) -> list[ImageInput]:
    """Expand files, folders (with their sub-folders), globs and URLs into images, in the order given.

    Each image is listed once, also if it was named twice, for instance by its relative and its absolute path.

    Args:
        arguments: The command line's image arguments.
        exclude: Folder of results to skip if it lies inside a folder argument.
        left_out: List that gets a line for each folder with files that are not pictures, which are left out.

    Returns:
        The images. An argument without any image appears as one entry with `error` set, and so does a picture of a kind
        that is not read.
    """
    found: dict[str, ImageInput] = {}
    lines: list[str] = []
    for argument in arguments:
        for image in _expand(argument, exclude, lines):
            found.setdefault(_identity(image), image)
    if left_out is not None:
        left_out += dict.fromkeys(lines)
    return list(found.values())


def _identity(image: ImageInput) -> str:
    """Return a key that is equal for all spellings of one file's path; symbolic links are not resolved."""
    if is_url(image.source) or image.error is not None:
        return image.source
    path = Path(image.source)
    return str(path.parent.resolve() / path.name)


def _expand(argument: str, exclude: Path | None, left_out: list[str]) -> list[ImageInput]:
    if is_url(argument):
        return [ImageInput(argument, _name_of(argument))]
    try:
        return _expand_path(argument, exclude, left_out)
    except (OSError, RuntimeError, ValueError) as error:
        # A name too long for the file system, an unknown user after "~", or a null character.
        return [ImageInput(argument, "image", f"this path cannot be read ({reason(error)})")]


def _name_of(address: str) -> str:
    """Return the file name in an address, without characters that could lead to another folder."""
    try:
        name = PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(address).path)).name
    except ValueError:
        name = ""
    return re.sub(r"[^\w. -]", "_", name)[-LONGEST_NAME:].lstrip(". ") or "image"


def _expand_path(argument: str, exclude: Path | None, left_out: list[str]) -> list[ImageInput]:
    path = Path(argument).expanduser()
    if path.is_dir():
        images = _folder_images(path, path, exclude, left_out)
        return images or [ImageInput(argument, path.name, f"the folder has no images ({READABLE})")]
    if path.exists():
        return [ImageInput(str(path), path.name)]
    matches = sorted(glob.glob(str(path), recursive=True))
    if not matches:
        why = "nothing matches this pattern" if glob.has_magic(argument) else "there is no such file or folder"
        return [ImageInput(argument, path.name, why)]
    images = []
    for file in map(Path, matches):
        if file.is_dir():
            images += _folder_images(file, file.parent, exclude, left_out)
        else:
            images.append(_image(file, file.relative_to(file.parent)))
    return images or [ImageInput(argument, path.name, "the pattern matches folders without images")]


def _folder_images(folder: Path, root: Path, exclude: Path | None, left_out: list[str]) -> list[ImageInput]:
    """List the pictures in a folder and its sub-folders, filed under their paths inside `root`."""
    files = sort_files(folder, exclude)
    line = files.left_out(folder)
    if line is not None:
        left_out.append(line)
    return [_image(file, file.relative_to(root), why) for file, why in files.pictures]


def _image(file: Path, name: Path, error: str | None = None) -> ImageInput:
    if not file.exists():
        error = f"this link leads nowhere ({os.readlink(file)})"
    return ImageInput(str(file), str(name), error)


def read_image(source: str) -> Any:
    """Read one image as an upright RGB PIL picture.

    Args:
        source: Path or http(s) URL.

    Returns:
        The picture, turned by its EXIF orientation.

    Raises:
        ValueError: The address cannot be reached, or the source is missing, not an image, damaged or beyond a limit.
    """
    from gdino_hf.model.picture_pixels import load_image
    from gdino_hf.model.remote_pictures import fetched

    return load_image(fetched(source) if is_url(source) else Path(source))


def read_labels(text: str, option: str = "--labels") -> list[str]:
    """Read the labels in an option's value.

    Args:
        text: Label text, split as `gdino_hf.model.text_prompt.split_labels` says, or "@FILE" for a UTF-8 file with one
            label per line, which may hold commas and periods.
        option: The option's name, for messages.

    Returns:
        The labels in order, without blanks around them, each once.

    Raises:
        UsageError: The file cannot be read, there is no label, or a label holds bytes that are not UTF-8.
    """
    if text.startswith("@"):
        found = _file_labels(text, option)
        if found is None:
            raise UsageError(
                f"{option} {shorten(text, 200)}: only --labels of gdino detect takes JSON and saved vocabularies; give "
                "UTF-8 text with one label per line"
            )
        labels = found
    else:
        labels = split_labels(text)
    if not labels:
        raise UsageError(f'{option} {shorten(text)} holds no label; write for instance {option} "cat, remote control"')
    for label in labels:
        # Bytes of the command line that are not in the locale's encoding arrive as lone surrogates.
        if any("\ud800" <= character <= "\udfff" for character in label):
            raise UsageError(f"{option}: the label {shorten(label)} holds bytes that are not UTF-8; write it in UTF-8")
    return labels


def _file_labels(text: str, option: str) -> list[str] | None:
    from gdino_hf.detection.label_files import label_lines

    try:
        return label_lines(Path(text[1:]).expanduser())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{option} {shorten(text, 200)}: the label file cannot be read ({reason(error)}); give UTF-8 text"
        ) from error


def label_file(text: str) -> Path | None:
    """Return the path in "@FILE" if the file has more than one label per line: JSON or a saved vocabulary.

    Args:
        text: Value of --labels.

    Raises:
        UsageError: The file cannot be read.
    """
    return Path(text[1:]).expanduser() if text.startswith("@") and _file_labels(text, "--labels") is None else None
