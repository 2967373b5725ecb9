"""Checks of what visitors send: pictures and labels of bounded size; anything else is refused with one sentence."""

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
from gdino_hf.model.text_prompt import shorten, split_labels

MEGABYTE = 2**20
LARGEST_REQUEST = 100 * MEGABYTE
"""Largest size in bytes of one upload with all its files, and of one video."""
LARGEST_PICTURE = 20 * MEGABYTE
MOST_PIXELS = 40_000_000
LIMITS = PictureLimits(pixels=MOST_PIXELS, bytes=LARGEST_PICTURE, seconds=10)
"""Limits of a picture. Its formats are those of the package, `gdino_hf.model.picture_formats.PICTURE_FORMATS`."""
MOST_PICTURES = 50
MOST_LABELS = 100
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


def parse_labels(text: str | None, *, required: bool = True) -> list[str]:
    """Split label text with `split_labels`, and refuse labels that a public page should not accept.

    Args:
        text: "cat, remote control" or "a cat. a remote control."; `gdino_hf.model.text_prompt.split_labels` has the
            rule.
        required: Whether there must be a label.

    Returns:
        The labels in order, without duplicates.

    Raises:
        Refused: There is no label, there are more than `MOST_LABELS`, or one holds markup or no words.
    """
    text = _checked(text)
    labels = split_labels(text)
    if required and not labels:
        raise Refused('There is no label; write what to look for, for instance "cat, remote control".')
    if len(labels) > MOST_LABELS:
        raise Refused(f"There are {len(labels)} labels; one request takes {MOST_LABELS}, ask in two.")
    for label in labels:
        if all(unicodedata.category(character)[0] in "PZ" for character in label):
            raise Refused(f"The label {shorten(label)} consists of punctuation; use words.")
    return labels


# Words that separate the noun phrases of a sentence. A fixed list instead of a parser is enough, since the page shows
# the phrases it found, and a visitor can put commas where it fails. The phrases become separate labels, because
# gdino-nano was trained on names, and scores a phrase within a sentence far below any threshold.
_BETWEEN_WORDS = """
and or but while as than that which who whose there here it its this these those he she they his her their him them
with without on in at by of to from for into onto over under above below beside besides between behind near next
against along across around through inside outside front left right top bottom
is are was were be been being has have had does do sits sitting stands standing lies lying holds holding
wears wearing looks looking rides riding eats eating walks walking plays playing
"""
_BETWEEN = frozenset(_BETWEEN_WORDS.split())
_ARTICLES = frozenset(("a", "an", "the", "some", "any", "one", "two", "three"))


def parse_phrases(text: str | None) -> list[str]:
    """Split a sentence into the phrases it names: "a cat beside a red cup" gives "cat" and "red cup".

    What separates labels, and semicolons, separate phrases too; "St. Bernard" stays whole.

    Args:
        text: The sentence.

    Returns:
        The phrases in order, without duplicates.

    Raises:
        Refused: The sentence names nothing, or more than `MOST_LABELS`.
    """
    phrases: list[str] = []
    words: list[str] = []
    pieces = split_labels(_checked(text).replace(";", ","))
    for token in [*" , ".join(pieces).split(), ","]:
        word = token.lower().strip("!?:\"'()")
        if word in _BETWEEN or word == "," or not word:
            if words:
                phrases.append(" ".join(words))
            words = []
        elif word not in _ARTICLES or words:
            words.append(token.strip("!?:\"'()"))
    return parse_labels(", ".join(phrases)) if phrases else parse_labels("")


def _checked(text: str | None) -> str:
    """Return the text, or refuse it if it is too long or holds markup or control characters."""
    text = text or ""
    if len(text) > LONGEST_TEXT:
        raise Refused(f"The text has {len(text)} characters; labels may have {LONGEST_TEXT} in all, shorten them.")
    if "<" in text or ">" in text:
        # The page escapes what it shows, but programs that read the result files may not.
        raise Refused("A label holds an angle bracket, which belongs to markup; write plain words.")
    if any(unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\r\t" for character in text):
        raise Refused("A label holds control characters; write plain words.")
    return text
