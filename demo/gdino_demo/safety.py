"""What the page accepts: pictures and labels of bounded size, and one plain sentence for everything else."""

from __future__ import annotations

import io
import os
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from PIL import Image, UnidentifiedImageError

from gdino_hf.model.image_processing_gdino import load_image
from gdino_hf.model.text_prompt import split_labels

MEGABYTE = 2**20
LARGEST_REQUEST = 100 * MEGABYTE
"""Bytes of one upload, all its files together; a video may take the whole of it."""
LARGEST_PICTURE = 20 * MEGABYTE
MOST_PIXELS = 40_000_000
MOST_SCANS = 100
"""Of one JPEG: a progressive one has about ten, and each costs a pass over all pixels whatever its own few bytes."""
MOST_PICTURES = 50
MOST_LABELS = 100
LONGEST_TEXT = 4_000
KEPT_SECONDS = 600
"""How long a file, or what a model said about it, is kept after it was last used."""

# Every decoder that is left out is one less to be attacked.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_READABLE = "PNG, JPEG, WebP, GIF or BMP"


class Refused(gr.Error):
    """A request that is not carried out: one sentence of what is wrong, the limit and the remedy.

    Args:
        sentence: Plain text; what looks like markup is escaped, because the page shows errors as HTML.
    """

    def __init__(self, sentence: str) -> None:
        escaped = sentence.replace("<", "&lt;").replace(">", "&gt;")
        super().__init__(escaped, title="Not possible", print_exception=False)


@dataclass(frozen=True)
class Picture:
    """A checked photograph.

    Attributes:
        image: Upright, RGB.
        data: The file as it came: what is kept takes less memory this way than as pixels.
        name: The file's name, for results; it is not a path.
    """

    image: Image.Image
    data: bytes
    name: str


def read_picture(source: str | os.PathLike | bytes, name: str = "picture") -> Picture:
    """Decode a picture whose size was checked before any of its pixels were.

    Args:
        source: A file that was uploaded, or its bytes.
        name: What to call it in messages and results.

    Returns:
        The picture.

    Raises:
        Refused: It is too large, not a picture of a kind that is read, or damaged.
    """
    name = plain_name(name)
    data = source if isinstance(source, bytes) else _read_bytes(source, name)
    if len(data) > LARGEST_PICTURE:
        raise Refused(f"{name} has {len(data) // MEGABYTE} MB; a picture may have {LARGEST_PICTURE // MEGABYTE} MB.")
    start = data[:1000].lstrip().lower()
    if start.startswith((b"<svg", b"<?xml", b"<!doctype svg")) or b"<svg" in start:
        raise Refused(f"{name} is an SVG drawing, which is not made of pixels; save it as {_READABLE}.")
    try:
        with warnings.catch_warnings():
            # PIL's own comes at a size that is refused here anyway.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise Refused(_too_many_pixels(name)) from error
    except UnidentifiedImageError as error:
        raise Refused(f"{name} is not a picture that can be read here; give {_READABLE}.") from error
    except Exception as error:  # decoders raise whatever broken bytes lead them to
        raise Refused(f"{name} is damaged and cannot be decoded; save it again.") from error
    if opened.width * opened.height > MOST_PIXELS:
        raise Refused(_too_many_pixels(name, opened.size))
    # The marker of a scan cannot occur inside one.
    if opened.format == "JPEG" and data.count(b"\xff\xda") > MOST_SCANS:
        raise Refused(f"{name} is a JPEG of more than {MOST_SCANS} scans, which takes too long; save it again.")
    try:
        return Picture(load_image(opened), data, name)
    except ValueError as error:
        raise Refused(f"{name} is damaged and cannot be decoded; save it again.") from error


def _read_bytes(path: str | os.PathLike, name: str) -> bytes:
    try:
        size = os.path.getsize(path)
        if size > LARGEST_PICTURE:
            raise Refused(f"{name} has {size // MEGABYTE} MB; a picture may have {LARGEST_PICTURE // MEGABYTE} MB.")
        # Used now: it is kept for a while longer.
        os.utime(path)
        return Path(path).read_bytes()
    except OSError as error:
        raise Refused(f"{name} is no longer kept here; uploads are removed after a while, choose it again.") from error


def _too_many_pixels(name: str, size: tuple[int, int] | None = None) -> str:
    found = f"{size[0]} x {size[1]} pixels" if size else "far too many pixels"
    return f"{name} has {found}; a picture may have {MOST_PIXELS // 1_000_000} million, make it smaller."


def plain_name(name: str) -> str:
    """The last part of a file name, short and without characters that could be markup, a path or unseen."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    kept = "".join("_" if c in '<>:"|?*' or (unicodedata.category(c)[0] in "CZ" and c != " ") else c for c in last)
    kept = kept.strip(" .")
    return kept[-80:] or "picture"


def parse_labels(text: str | None, *, required: bool = True) -> list[str]:
    """Split label text as the whole package does and refuse what a page should not take.

    Args:
        text: "cat, remote control" or "a cat. a remote control."; `gdino_hf.model.text_prompt.split_labels` has the
            rule.
        required: Whether there must be a label.

    Returns:
        The labels in order, each once.

    Raises:
        Refused: There is none, there are too many, or one holds what no name holds.
    """
    text = _checked(text)
    labels = split_labels(text)
    if required and not labels:
        raise Refused('There is no label; write what to look for, for instance "cat, remote control".')
    if len(labels) > MOST_LABELS:
        raise Refused(f"There are {len(labels)} labels; one request takes {MOST_LABELS}, ask in two.")
    for label in labels:
        if all(unicodedata.category(character)[0] in "PZ" for character in label):
            raise Refused(f"The label {label!r} has nothing to look for in it; use words.")
    return labels


# The words between the things that a sentence names. A closed list instead of a parser: it is small, and the page
# shows the phrases it found, so that a reader can put commas where it errs. The phrases become labels of their own:
# gdino-nano, which learnt names and no sentences, scores a phrase inside its sentence far below any threshold.
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
    """The phrases that a sentence names: "a cat beside a red cup" is "cat" and "red cup".

    A sentence with commas or periods inside is parted there too.

    Args:
        text: The sentence.

    Returns:
        The phrases in order, each once.

    Raises:
        Refused: It names nothing, or too much.
    """
    phrases: list[str] = []
    words: list[str] = []
    for token in [*_checked(text).replace(",", " , ").replace(".", " , ").replace(";", " , ").split(), ","]:
        word = token.lower().strip("!?:\"'()")
        if word in _BETWEEN or word == "," or not word:
            if words:
                phrases.append(" ".join(words))
            words = []
        elif word not in _ARTICLES or words:
            words.append(token.strip("!?:\"'()"))
    return parse_labels(", ".join(phrases)) if phrases else parse_labels("")


def _checked(text: str | None) -> str:
    text = text or ""
    if len(text) > LONGEST_TEXT:
        raise Refused(f"The text has {len(text)} characters; labels may have {LONGEST_TEXT} in all, shorten them.")
    if "<" in text or ">" in text:
        # The page escapes what it shows; files and other programs that get the labels may not.
        raise Refused("A label holds an angle bracket, which belongs to markup and not to a name; write plain words.")
    if any(unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\r\t" for character in text):
        raise Refused("A label holds control characters; write plain words.")
    return text
