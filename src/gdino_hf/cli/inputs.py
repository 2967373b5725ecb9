"""Inputs named on the command line: images in files, folders, globs and URLs; labels in text and files."""

from __future__ import annotations

import glob
import os
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gdino_hf.error_text import reason
from gdino_hf.model.text_prompt import split_labels

from .errors import UsageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif")
LONGEST_NAME = 100
URL_TIMEOUT_SECONDS = 30
URL_LIMIT_BYTES = 200 * 2**20


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


def collect_images(arguments: Sequence[str], exclude: Path | None = None) -> list[ImageInput]:
    """Expand files, folders (with their sub-folders), globs and URLs into images, in the order given.

    Each image is listed once, also if it was named twice, for instance by its relative and its absolute path.

    Args:
        arguments: The command line's image arguments.
        exclude: Folder of results to skip if it lies inside a folder argument.

    Returns:
        The images. An argument without any image appears as one entry with `error` set.
    """
    found: dict[str, ImageInput] = {}
    for argument in arguments:
        for image in _expand(argument, exclude):
            found.setdefault(_identity(image), image)
    return list(found.values())


def _identity(image: ImageInput) -> str:
    """Return a key that is equal for all spellings of one file's path; symbolic links are not resolved."""
    if is_url(image.source) or image.error is not None:
        return image.source
    path = Path(image.source)
    return str(path.parent.resolve() / path.name)


def _expand(argument: str, exclude: Path | None) -> list[ImageInput]:
    if is_url(argument):
        return [ImageInput(argument, _name_of(argument))]
    try:
        return _expand_path(argument, exclude)
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


def _expand_path(argument: str, exclude: Path | None) -> list[ImageInput]:
    path = Path(argument).expanduser()
    if path.is_dir():
        images = [_image(file, file.relative_to(path)) for file in _files_below(path, exclude)]
        return images or [ImageInput(argument, path.name, f"the folder has no images ({', '.join(IMAGE_SUFFIXES)})")]
    if path.exists():
        return [ImageInput(str(path), path.name)]
    matches = sorted(glob.glob(str(path), recursive=True))
    if not matches:
        why = "nothing matches this pattern" if glob.has_magic(argument) else "there is no such file or folder"
        return [ImageInput(argument, path.name, why)]
    images = []
    for match in matches:
        file = Path(match)
        below = _files_below(file, exclude) if file.is_dir() else [file]
        images += [_image(each, each.relative_to(file.parent)) for each in below]
    return images or [ImageInput(argument, path.name, "the pattern matches folders without images")]


def _image(file: Path, name: Path) -> ImageInput:
    return ImageInput(str(file), str(name), None if file.exists() else f"this link leads nowhere ({os.readlink(file)})")


def _files_below(folder: Path, exclude: Path | None) -> list[Path]:
    """List the image files in a folder and its sub-folders, sorted, without hidden files and those in `exclude`.

    Dangling links are listed too, so that the user is told about them.
    """
    skip = exclude.resolve() if exclude is not None and exclude.resolve() != folder.resolve() else None
    files = []
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if hidden or file.suffix.lower() not in IMAGE_SUFFIXES or not (file.is_file() or _is_dangling(file)):
            continue
        place = file.parent.resolve()
        if skip is None or skip not in (place, *place.parents):
            files.append(file)
    return files


def _is_dangling(file: Path) -> bool:
    return file.is_symlink() and not file.exists()


def read_url(address: str) -> bytes:
    """Download one image.

    Args:
        address: An http or https URL.

    Returns:
        The bytes of the response.

    Raises:
        OSError: The server cannot be reached or refuses the request.
        ValueError: The response is larger than 200 MB.
    """
    import urllib.request

    request = urllib.request.Request(address, headers={"User-Agent": "gdino-hf"})
    with urllib.request.urlopen(request, timeout=URL_TIMEOUT_SECONDS) as answer:
        data = answer.read(URL_LIMIT_BYTES + 1)
    if len(data) > URL_LIMIT_BYTES:
        raise ValueError(f"the response is larger than {URL_LIMIT_BYTES // 2**20} MB; download it and pass the file")
    return data


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
        try:
            lines = Path(text[1:]).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{option} {text}: the label file cannot be read ({reason(error)}); give UTF-8 text"
            ) from error
        labels = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    else:
        labels = split_labels(text)
    if not labels:
        raise UsageError(f'{option} {text!r} holds no label; write for instance {option} "cat, remote control"')
    for label in labels:
        # Bytes of the command line that are not in the locale's encoding arrive as lone surrogates.
        if any("\ud800" <= character <= "\udfff" for character in label):
            raise UsageError(f"{option}: the label {label!r} holds bytes that are not UTF-8; write it in UTF-8")
    return labels
