"""Captions that change: cut to the length of a prompt, mirrored with their picture, their phrases' characters kept."""

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
# "left" by itself or as a word's part that still means the side; letters and digits of any script belong to a word.
_SIDE = re.compile(r"(?<![^\W_])(left|right)(?=(?:most|wards?|hand|handed|side)?(?![^\W_]))", re.IGNORECASE)


def swap_sides(text: str) -> tuple[str, Callable[[int, int], Span]]:
    """What a text says of a mirrored picture: "left" and "right" change places, "leftover" and "bright" stay.

    Args:
        text: A caption or a label.

    Returns:
        The text with the case of each word kept, and a function that moves [start, end) characters along.
    """
    pieces: list[str] = []
    # (old start, old end, new start, new end) of every word that changed
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
    """A character's new place; one inside a changed word goes to the word's beginning or end."""
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
    """Characters that stay together, and how many tokens they have with the period that closes them."""

    start: int
    end: int
    length: int


def fit_caption(caption: str, spans: Spans, tokenizer: Any, max_text_len: int, turn: int) -> tuple[str, Spans]:
    """Cut a caption that is longer than a prompt, its phrases last.

    Sentences in which no phrase stands go first. Where those with phrases do not fit, they are parted into groups, one
    a turn: over as many epochs as there are groups, every phrase is trained on. A sentence longer than a prompt is cut
    between words, not in a phrase if it can be helped. What goes changes nothing for the rest, since the text encoder
    reads every sentence by itself.

    Args:
        caption: The text.
        spans: Per box its [start, end) characters.
        tokenizer: Fast tokenizer of the model's text encoder.
        max_text_len: Most tokens of the prompt.
        turn: Which group is chosen, the epoch say.

    Returns:
        The caption, and per box the characters of its phrase in it: none where the phrase was left out.
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
        # Words cut in two may come out as other tokens, of another number.
        room = max(2, room - 1)


def _pieces(tokens: list[tuple[int, int, int]], spans: Spans, special: list[int], room: int) -> list[_Piece]:
    """Sentences, and parts of those that are longer than a prompt."""
    pieces: list[_Piece] = []
    begin = 0
    for place, (token, _, end) in enumerate(tokens):
        closes = token in special
        # One token is kept for the period that a cut needs.
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
    """The token to begin anew with: the latest that begins a word outside any phrase, or any word, or any token."""
    words = [place for place in range(last, begin, -1) if tokens[place][1] > tokens[place - 1][2]]
    outside = (
        place for place in words if not any(start < tokens[place][1] < end for pairs in spans for start, end in pairs)
    )
    return next(outside, words[0] if words else last)


def _choose(pieces: list[_Piece], spans: Spans, room: int, turn: int) -> list[_Piece]:
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
