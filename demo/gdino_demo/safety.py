"""Checks of what visitors send: pictures and text of bounded size; anything else is refused with one sentence."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from PIL import Image

from gdino_hf.model.picture_files import open_picture
from gdino_hf.model.picture_limits import PictureError, PictureLimits
from gdino_hf.model.picture_pixels import to_rgb

MEGABYTE = 2**20
LARGEST_REQUEST = 100 * MEGABYTE
"""Largest size in bytes of one upload with all its files, and of one video."""
LARGEST_PICTURE = 20 * MEGABYTE
MOST_PIXELS = 40_000_000
LIMITS = PictureLimits(pixels=MOST_PIXELS, bytes=LARGEST_PICTURE, seconds=10)
"""Limits of a picture. Its formats are those of the package, `gdino_hf.model.picture_formats.PICTURE_FORMATS`."""
MOST_PICTURES = 50
MOST_LABELS = 100
"""Largest number of names of all labels of a request together, aliases among them."""
LONGEST_TEXT = 4_000
KEPT_SECONDS = 600
"""How long files and model outputs are kept after their last use."""

# The package's own remedies name settings, which visitors do not have.
_REMEDIES = {
    "pixels": "make it smaller",
    "bytes": "make it smaller",
    "time": "save it again",
    "damaged": "save it again",
}


class Refused(gr.Error):
    """A request that is refused, with one sentence that says what is wrong, the limit and the remedy.

    Args:
        sentence: Plain text; angle brackets are escaped, because the page shows errors as HTML.
    """

    def __init__(self, sentence: str) -> None:
        escaped = sentence.replace("<", "&lt;").replace(">", "&gt;")
        super().__init__(escaped, title="Not possible", print_exception=False)


@dataclass(frozen=True)
class Picture:
    """A checked picture.

    Attributes:
        image: Upright RGB picture.
        data: Content of the file, which takes less memory than the pixels.
        name: File name for results, without path.
    """

    image: Image.Image
    data: bytes
    name: str


def read_picture(source: str | os.PathLike | bytes, name: str = "picture") -> Picture:
    """Decode a picture after its size in bytes and pixels was checked.

    Args:
        source: Path of an uploaded file, or the content of a file.
        name: File name for messages and results.

    Returns:
        The picture.

    Raises:
        Refused: The file is too large or damaged, or not a picture that can be read here.
    """
    name = plain_name(name)
    data = source if isinstance(source, bytes) else _read_bytes(source, name)
    try:
        return Picture(to_rgb(open_picture(data, LIMITS, name=name)), data, name)
    except PictureError as error:
        # What a decoder says about a damaged file helps no visitor.
        what = "is damaged and cannot be decoded" if error.kind == "damaged" else error.what
        raise Refused(f"{name} {what}; {_REMEDIES.get(error.kind, error.remedy)}.") from error
    except ValueError as error:  # pixels that are not finite, negative or too large
        raise Refused(f"{name} cannot be used: {error}") from error


def _read_bytes(path: str | os.PathLike, name: str) -> bytes:
    """Read an uploaded file of bounded size."""
    try:
        size = os.path.getsize(path)
        if size > LARGEST_PICTURE:
            raise Refused(f"{name} has {size // MEGABYTE} MB; a picture may have {LARGEST_PICTURE // MEGABYTE} MB.")
        # Set the time of last use: files that have not been used for a while are removed.
        os.utime(path)
        return Path(path).read_bytes()
    except OSError as error:
        raise Refused(
            f"{name} is no longer kept here; uploads are removed after some minutes, choose it again."
        ) from error


def plain_name(name: str) -> str:
    """Return the last part of a file name, shortened, without path, markup and invisible characters."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    kept = "".join("_" if c in '<>:"|?*' or (unicodedata.category(c)[0] in "CZ" and c != " ") else c for c in last)
    kept = kept.strip(" .")
    return kept[-80:] or "picture"


def check_text(text: str | None, what: str = "label") -> str:
    """Return text that a public page can accept, or refuse it.

    Args:
        text: What a visitor typed or uploaded.
        what: What it is, for the message.

    Returns:
        The text; empty for None.

    Raises:
        Refused: It has more than `LONGEST_TEXT` characters, or holds markup or control characters.
    """
    text = text or ""
    if len(text) > LONGEST_TEXT:
        raise Refused(f"The text has {len(text)} characters; a {what} field takes {LONGEST_TEXT}, shorten it.")
    if "<" in text or ">" in text:
        # The page escapes what it shows, but programs that read the result files may not.
        raise Refused(f"A {what} holds an angle bracket, which belongs to markup; write plain words.")
    if any(unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\r\t" for character in text):
        raise Refused(f"A {what} holds control characters; write plain words.")
    return text
