"""Edits of captions that keep each phrase's character spans valid: mirroring and shortening to the prompt length."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.caption_prompt import caption_tokens
from ..model.text_prompt import special_token_ids
from .prompt_packing import pack

Span = list[int]
Spans = list[list[Span]]

_SIDES = {"left": "right", "right": "left"}
# "left" or "right" as a word, or with a suffix that still names the side; a word is letters and digits of any script.
_SIDE = re.compile(r"(?<![^\W_])(left|right)(?=(?:most|wards?|hand|handed|side)?(?![^\W_]))", re.IGNORECASE)


def swap_sides(text: str) -> tuple[str, Callable[[int, int], Span]]:
    """Swap "left" and "right" in a text, as mirroring its image does; "leftover" and "bright" stay as they are.

    Args:
        text: A caption or a label.

    Returns:
        The new text, with the case of each word kept, and a function that maps [start, end) characters of the old text
        to those of the new one.
    """
    pieces: list[str] = []
    # (old start, old end, new start, new end) of every swapped word.
    changes: list[tuple[int, int, int, int]] = []
    place, length = 0, 0
    for match in _SIDE.finditer(text):
        word = match.group()
        swapped = _SIDES[word.lower()]
        if word.isupper():
            swapped = swapped.upper()
        elif word[0].isupper():
            swapped = swapped.capitalize()
        pieces += [text[place : match.start()], swapped]
        begin = length + match.start() - place
        length = begin + len(swapped)
        changes.append((match.start(), match.end(), begin, length))
        place = match.end()
    pieces.append(text[place:])

    def move(start: int, end: int) -> Span:
        return [_moved(start, changes, to_end=False), _moved(end, changes, to_end=True)]

    return "".join(pieces), move


def _moved(place: int, changes: Sequence[tuple[int, int, int, int]], to_end: bool) -> int:
    """Map a character position to the changed text; one inside a swapped word moves to the word's start or end."""
    shift = 0
    for start, end, new_start, new_end in changes:
        if place <= start:
            break
        if place < end:
            return new_end if to_end else new_start
        shift = new_end - end
    return place + shift


@dataclass(frozen=True)
class _Piece:
    """Characters that stay together, and their number of tokens including the period that closes them."""

    start: int
    end: int
    length: int


def fit_caption(caption: str, spans: Spans, tokenizer: Any, max_text_len: int, turn: int) -> tuple[str, Spans]:
    """Shorten a caption that does not fit a prompt, keeping its annotated phrases as long as possible.

    Sentences without a phrase are dropped first. If those with phrases still do not fit, they are split into groups and
    `turn` selects one, so that over as many epochs as there are groups every phrase is trained on. A sentence longer
    than a prompt is cut between words, inside a phrase only if there is no other place. Dropping a sentence does not
    affect the others, since the text encoder reads each sentence by itself.

    Args:
        caption: The caption.
        spans: Characters of each box's phrase, a list of [start, end) per box.
        tokenizer: Fast tokenizer of the model's text encoder.
        max_text_len: Maximum number of tokens in a prompt.
        turn: Number that selects the group of sentences, usually the epoch.

    Returns:
        The caption, and the spans of each box's phrase in it; empty for phrases that were dropped.
    """
    special = special_token_ids(tokenizer)
    room = max_text_len - 2
    while True:
        tokens = caption_tokens(caption, tokenizer)
        closed = bool(tokens) and tokens[-1][0] in special
        if len(tokens) + (not closed) <= max_text_len - 2:
            return caption, spans
        pieces = _pieces(tokens, spans, special, room)
        chosen = _choose(pieces, spans, room, turn)
        caption, spans = _join(caption, spans, chosen)
        # A word that was cut may tokenize into a different number of tokens.
        room = max(2, room - 1)


def _pieces(tokens: list[tuple[int, int, int]], spans: Spans, special: list[int], room: int) -> list[_Piece]:
    """Split the caption into sentences, and sentences longer than a prompt into parts."""
    pieces: list[_Piece] = []
    begin = 0
    for place, (token, _, end) in enumerate(tokens):
        closes = token in special
        # A part that is cut off needs one more token for its closing period.
        if closes:
            pieces.append(_Piece(tokens[begin][1], end, place + 1 - begin))
            begin = place + 1
        elif place + 1 - begin == room:
            cut = _cut(tokens, spans, begin, place)
            pieces.append(_Piece(tokens[begin][1], tokens[cut - 1][2], cut - begin + 1))
            begin = cut
    if begin < len(tokens):
        pieces.append(_Piece(tokens[begin][1], tokens[-1][2], len(tokens) - begin + 1))
    return pieces


def _cut(tokens: list[tuple[int, int, int]], spans: Spans, begin: int, last: int) -> int:
    """Return the token to cut before: the last that starts a word outside any phrase, else any word, else any token."""
    words = [place for place in range(last, begin, -1) if tokens[place][1] > tokens[place - 1][2]]
    outside = (
        place for place in words if not any(start < tokens[place][1] < end for pairs in spans for start, end in pairs)
    )
    return next(outside, words[0] if words else last)


def _choose(pieces: list[_Piece], spans: Spans, room: int, turn: int) -> list[_Piece]:
    """Choose the pieces to keep: one group of those with phrases, then others while they fit."""
    named = {
        index
        for index, piece in enumerate(pieces)
        if any(start < piece.end and piece.start < end for pairs in spans for start, end in pairs)
    }
    order = sorted(named)
    groups = pack([pieces[index].length for index in order], room)
    group = groups[turn % len(groups)]
    taken = {order[index] for index in group}
    if len(groups) == 1:
        left = room - sum(pieces[index].length for index in taken)
        for index, piece in enumerate(pieces):
            if index not in named and piece.length <= left:
                taken.add(index)
                left -= piece.length
    return [pieces[index] for index in sorted(taken)]


def _join(caption: str, spans: Spans, pieces: list[_Piece]) -> tuple[str, Spans]:
    """Join the pieces into a caption and move the spans along."""
    text = ""
    moved: Spans = [[] for _ in spans]
    for piece in pieces:
        shift = len(text) - piece.start
        for pairs, into in zip(spans, moved, strict=True):
            for start, end in pairs:
                low, high = max(start, piece.start), min(end, piece.end)
                if low < high:
                    into.append([low + shift, high + shift])
        part = caption[piece.start : piece.end]
        text += part + (" " if part.endswith((".", "?")) else ". ")
    return text.rstrip(), moved
