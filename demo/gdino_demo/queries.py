"""What visitors ask for, checked: label text with aliases, vocabulary files, captions and tiles."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from gdino_hf import Vocabulary
from gdino_hf.detection.label_files import read_label_file
from gdino_hf.detection.phrase_grounding import noun_phrases
from gdino_hf.detection.vocabulary import Entry, Labels
from gdino_hf.detection.vocabulary_text import parse_vocabulary
from gdino_hf.model.text_prompt import shorten

from .safety import LONGEST_TEXT, MEGABYTE, MOST_LABELS, Refused, check_text, plain_name

LARGEST_VOCABULARY = 8 * MEGABYTE
WHOLE, PHRASES = "the sentence as a whole", "each phrase by itself"
"""How a model reads a caption."""


@dataclass(frozen=True)
class Query:
    """What to look for in a picture, by labels or by a caption.

    Attributes:
        vocabulary: The labels, or the phrases of a caption as labels; None for a caption that is one prompt.
        caption: A sentence whose phrases to look for; None for labels.
        phrases: (start, end) characters of each phrase of the caption.
        tiles: Side in pixels of the tiles that are looked at beside the whole picture; 0 for the whole alone.
    """

    vocabulary: Vocabulary | None = None
    caption: str | None = None
    phrases: tuple[tuple[int, int], ...] = ()
    tiles: int = 0

    @property
    def negatives(self) -> tuple[str, ...]:
        """Labels that compete for boxes but are left out of results."""
        return () if self.vocabulary is None else self.vocabulary.negative_labels


def read_query(
    labels: str | None, negatives: str | None = "", file: tuple[str, str] | None = None, tiles: float = 0
) -> Query:
    """Read what a tab's fields ask for.

    Args:
        labels: Label text as `parse_vocabulary` reads it; not used with a file.
        negatives: Label text of the labels that compete for boxes but are left out of results; may be empty.
        file: Path and name of an uploaded vocabulary file.
        tiles: Side of tiles in pixels; 0 for none.

    Returns:
        The query.

    Raises:
        Refused: There is no label, there are too many, or one cannot be used.
    """
    try:
        competing = parse_vocabulary(check_text(negatives, "negative label"))
        if file is not None:
            return Query(read_vocabulary_file(*file, competing), tiles=int(tiles))
        names = parse_vocabulary(check_text(labels))
        if not names:
            raise Refused('There is no label; write what to look for, for instance "cat, remote control".')
        vocabulary = Vocabulary(names, negative=competing)
    except ValueError as error:
        raise Refused(str(error)) from error
    _check(vocabulary)
    return Query(vocabulary, tiles=int(tiles))


def read_caption(caption: str | None, reading: str = WHOLE) -> Query:
    """Read the caption field.

    Args:
        caption: A sentence. Blanks and line breaks become single blanks.
        reading: `WHOLE`, or `PHRASES` for models that know names but no sentences.

    Returns:
        The query.

    Raises:
        Refused: The caption has no word, is too long, or holds markup.
    """
    text = " ".join(check_text(caption, "caption").split())
    if not _has_words(text):
        raise Refused('There is no caption; write a sentence, for instance "a man holding a red cup".')
    # A caption without a noun phrase is a phrase itself.
    phrases = tuple(noun_phrases(text)) or ((0, len(text)),)
    if reading == WHOLE:
        return Query(caption=text, phrases=phrases)
    try:
        vocabulary = Vocabulary([text[start:end] for start, end in phrases])
    except ValueError as error:
        raise Refused(str(error)) from error
    _check(vocabulary)
    return Query(vocabulary, text, phrases)


def read_vocabulary_file(path: str, name: str, competing: Labels = ()) -> Vocabulary:
    """Read an uploaded vocabulary file.

    Text features in it are not used: they would be shared with other visitors, so the page computes its own.

    Args:
        path: Path of the file, of any kind that `read_label_file` reads.
        name: Its name, for messages.
        competing: Negative labels; a saved vocabulary has its own.

    Returns:
        A vocabulary within the page's limits.

    Raises:
        Refused: The file is too large, is not a vocabulary, or has labels that cannot be used.
    """
    name = plain_name(name)
    try:
        size = os.path.getsize(path)
        if size > LARGEST_VOCABULARY:
            raise Refused(
                f"{name} has {size / MEGABYTE:.1f} MB; a vocabulary may have {LARGEST_VOCABULARY // MEGABYTE} MB, save "
                "it without text features."
            )
        # Set the time of last use: files that have not been used for a while are removed.
        os.utime(path)
        vocabulary = read_label_file(path, **({"negative": competing} if len(competing) > 0 else {}))
    except OSError as error:
        raise Refused(
            f"{name} is no longer kept here; uploads are removed after some minutes, choose it again."
        ) from error
    except TypeError as error:
        raise Refused(f"{name} is a saved vocabulary, which has its own negative labels; empty the field.") from error
    except ValueError as error:
        raise Refused(str(error).replace(path, name)) from error
    vocabulary.encoded = None
    _check(vocabulary)
    return vocabulary


def _check(vocabulary: Vocabulary) -> None:
    """Refuse a vocabulary that a public page should not accept."""
    _check_names("label", vocabulary.entries)
    _check_names("negative label", vocabulary.negative_entries)
    asked = {label.casefold() for label in vocabulary.labels}
    for label in vocabulary.negative_labels:
        if label.casefold() in asked:
            raise Refused(f"{shorten(label)} is a label and a negative label; leave it in one of them.")


def _check_names(what: str, entries: Iterable[Entry]) -> None:
    names = [name for entry in entries for name in entry.texts]
    every = {*names, *(entry.label for entry in entries)}
    if len(names) > MOST_LABELS:
        raise Refused(f"There are {len(names)} {what}s; one request takes {MOST_LABELS}, ask in two.")
    length = sum(map(len, every))
    if length > LONGEST_TEXT:
        raise Refused(f"The {what}s have {length} characters; they may have {LONGEST_TEXT}, shorten them.")
    for name in every:
        if not _has_words(check_text(name, what)):
            raise Refused(f"The {what} {shorten(name)} consists of punctuation; use words.")


def _has_words(text: str) -> bool:
    return any(unicodedata.category(character)[0] not in "PZ" for character in text)
