"""What the user typed, made concrete: images out of files, folders, globs and URLs; labels out of text and files."""

from __future__ import annotations

import glob
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .errors import UsageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif")
LONGEST_NAME = 100
URL_TIMEOUT_SECONDS = 30
URL_LIMIT_BYTES = 200 * 2**20


@dataclass(frozen=True)
class ImageInput:
    """One image to work on.

    Attributes:
        source: Path or URL, as reported to the user.
        name: Relative path its results are filed under: inside a folder input, the path below that folder.
        error: Why there is no such image, None when there seems to be one.
    """

    source: str
    name: str
    error: str | None = None


def is_url(text: str) -> bool:
    """Whether the text is a web address."""
    return text.lower().startswith(("http://", "https://"))


def collect_images(arguments: Sequence[str], exclude: Path | None = None) -> list[ImageInput]:
    """Expand files, folders (with their sub-folders), globs and URLs, each image once, in the order given.

    A file named in two ways, by its relative and its absolute path, say, is one image.

    Args:
        arguments: What the user typed.
        exclude: A folder of results that folder inputs leave out when it lies inside them.

    Returns:
        The images. An argument that yields none appears once, with `error` set.
    """
    found: dict[str, ImageInput] = {}
    for argument in arguments:
        for image in _expand(argument, exclude):
            found.setdefault(_identity(image), image)
    return list(found.values())


def _identity(image: ImageInput) -> str:
    """What two spellings of one file have in common; a link to a file is a file of its own."""
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
        # Too long for the file system, no such user behind "~", a null character.
        return [ImageInput(argument, "image", f"this is no path that can be read ({error})")]


def _name_of(address: str) -> str:
    """A file name out of an address, with nothing in it that leads elsewhere."""
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
        reason = "nothing matches this pattern" if glob.has_magic(argument) else "there is no such file or folder"
        return [ImageInput(argument, path.name, reason)]
    images = []
    for match in matches:
        file = Path(match)
        below = _files_below(file, exclude) if file.is_dir() else [file]
        images += [_image(each, each.relative_to(file.parent)) for each in below]
    return images or [ImageInput(argument, path.name, "the pattern matches folders without images")]


def _image(file: Path, name: Path) -> ImageInput:
    return ImageInput(str(file), str(name), None if file.exists() else f"this link leads nowhere ({os.readlink(file)})")


def _files_below(folder: Path, exclude: Path | None) -> list[Path]:
    """Image files in a folder and its sub-folders, sorted, without hidden ones and those in `exclude`.

    Links that lead nowhere are among them: the user is told about those.
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
        address: http or https.

    Returns:
        The bytes as sent.

    Raises:
        OSError: The server cannot be reached or refuses.
        ValueError: The answer is larger than 200 MB.
    """
    request = urllib.request.Request(address, headers={"User-Agent": "gdino-hf"})
    with urllib.request.urlopen(request, timeout=URL_TIMEOUT_SECONDS) as answer:
        data = answer.read(URL_LIMIT_BYTES + 1)
    if len(data) > URL_LIMIT_BYTES:
        raise ValueError(f"the answer is larger than {URL_LIMIT_BYTES // 2**20} MB; download it and pass the file")
    return data


def parse_labels(text: str, option: str = "--labels") -> list[str]:
    """Labels out of an option's value: separated by commas, closed by periods, or one per line of a file.

    Periods part labels only where the text has no comma and ends in one: "St. Bernard" is one label.

    Args:
        text: "cat, remote control", "a cat. a remote control." or "@labels.txt".
        option: Its name, for messages.

    Returns:
        The labels in order, without blanks around them, each once.

    Raises:
        UsageError: The file cannot be read, there is no label, or a label holds bytes that are no text.
    """
    if text.startswith("@"):
        try:
            pieces = Path(text[1:]).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{option} {text}: the label file cannot be read ({error}); give UTF-8 text") from error
    elif "," not in text and text.rstrip().endswith("."):
        pieces = text.split(".")
    else:
        pieces = text.split(",")
    labels = list(dict.fromkeys(piece.strip() for piece in pieces if piece.strip()))
    if not labels:
        raise UsageError(f'{option} {text!r} holds no label; write for instance {option} "cat, remote control"')
    for label in labels:
        # What the shell passes on without knowing how to read it arrives as lone surrogates.
        if any("\ud800" <= character <= "\udfff" for character in label):
            raise UsageError(f"{option}: the label {label!r} holds bytes that are no text; write it in UTF-8")
    return labels
