"""Prompts: labels to tokens and back to phrases."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# More than any language's words have, far less than what is not a label but a text.
CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class PhraseStructure:
    """How the tokens of a batch of prompts group into phrases.

    Attributes:
        phrase_ids: (B, T) int64 ordinal of the phrase each token belongs to, -1 on special tokens and padding.
        phrase_mask: (B, T, T) bool, True = may attend.
        position_ids: (B, T) int64, restarting at 0 in every block.
    """

    phrase_ids: Tensor
    phrase_mask: Tensor
    position_ids: Tensor


def phrase_structure(input_ids: Tensor, attention_mask: Tensor, special_token_ids: Sequence[int]) -> PhraseStructure:
    """Group tokens into phrases; a phrase and the delimiter that closes it are one block of attention.

    [CLS] and [SEP] stand alone, and so does every padding token. A last phrase without a delimiter is a block of its
    own whatever the padding.

    Args:
        input_ids: (B, T).
        attention_mask: (B, T), nonzero on real tokens.
        special_token_ids: [CLS], [SEP] and the delimiters, in this order.

    Returns:
        The phrases.
    """
    real = attention_mask.bool()
    special = torch.zeros_like(real)
    for token in special_token_ids:
        special = special | (input_ids == token)
    alone = (input_ids == special_token_ids[0]) | (input_ids == special_token_ids[1]) | ~real
    ends = special | ~real
    after_end = torch.nn.functional.pad(ends[:, :-1], (1, 0), value=True)
    # A block begins after every special token and wherever a token stands alone.
    begins = after_end | alone
    block = begins.cumsum(dim=-1)
    place = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    start = torch.where(begins, place, torch.zeros_like(place)).cummax(dim=-1).values
    word = real & ~special
    first_word = word & torch.nn.functional.pad(~word[:, :-1], (1, 0), value=True)
    ordinal = first_word.cumsum(dim=-1) - 1
    return PhraseStructure(
        phrase_ids=torch.where(word, ordinal, torch.full_like(ordinal, -1)),
        phrase_mask=block[:, :, None] == block[:, None, :],
        position_ids=place - start,
    )


@dataclass(frozen=True)
class PromptChunk:
    """As many labels as one prompt holds.

    Attributes:
        input_ids: "[CLS] label . label . [SEP]".
        label_indices: Place of each of the chunk's labels in `Prompt.labels`; every chunk has the negative ones.
        spans: (start, end) tokens of each of the chunk's labels.
    """

    input_ids: tuple[int, ...]
    label_indices: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Prompt:
    """What one image is asked for.

    Attributes:
        labels: The caller's labels in the caller's spelling, negative ones at the end.
        num_negatives: How many of them compete but are left out of results.
        chunks: The tokens; more than one chunk where the labels do not fit one prompt.
        offsets: Of a caption, the (start, end) characters of each token; None where labels make the prompt.
    """

    labels: tuple[str, ...]
    num_negatives: int
    chunks: tuple[PromptChunk, ...]
    offsets: tuple[tuple[int, int], ...] | None = None

    @property
    def num_positives(self) -> int:
        """Labels that may appear in results."""
        return len(self.labels) - self.num_negatives


def parse_labels(text: str | Sequence[str]) -> list[str]:
    """Labels as a list, from a list or from "a cat. a remote control.".

    Args:
        text: Labels, or one string with a period after each.

    Returns:
        The labels without blanks around them.

    Raises:
        TypeError: text is neither a string nor a sequence of strings.
        ValueError: There is no label, or one is empty.
    """
    if isinstance(text, str):
        labels = [piece.strip() for piece in text.split(".")]
        labels = [label for label in labels if label]
        if not labels:
            raise ValueError(f"The text {text!r} names nothing; write for instance 'cat. remote control.'.")
        return labels
    if not isinstance(text, Sequence) or not all(isinstance(label, str) for label in text):
        raise TypeError(f"Labels must be a string or a list of strings, got {shorten(text)}.")
    if len(text) == 0:
        raise ValueError("The list of labels is empty; name at least one thing to look for.")
    labels = [label.strip() for label in text]
    if not all(labels):
        raise ValueError(f"Label {labels.index('')} is empty; leave it out or name something.")
    return labels


def build_prompt(
    labels: str | Sequence[str], tokenizer: Any, max_text_len: int = 256, negative_labels: Sequence[str] = ()
) -> Prompt:
    """Put labels into as few prompts as hold them; no label is cut, and every label is closed by a period.

    Labels compete for a box inside one prompt only, so negative labels stand in every chunk.

    Periods and question marks inside a label would split it, so they become blanks in the prompt; results still carry
    the label as it was given.

    Args:
        labels: A list, or "a cat. a remote control.".
        tokenizer: Tokenizer of the model's text encoder.
        max_text_len: Most tokens of one prompt.
        negative_labels: Labels that compete but are left out of results.

    Returns:
        The prompt.

    Raises:
        TypeError: A label is not a string.
        ValueError: There is no label, or one is empty, has no letters, or is longer than a prompt that holds the
            negative labels too.
    """
    positives = parse_labels(labels)
    negatives = parse_labels(negative_labels) if len(negative_labels) > 0 else []
    every = positives + negatives
    special = special_token_ids(tokenizer)
    start, end, period = special[:3]
    words = [" ".join(label.replace(".", " ").replace("?", " ").split()) for label in every]
    room = max_text_len - 2
    # Some tokenizers make one unknown token of an endless word, so characters have a limit too.
    most = CHARACTERS_PER_TOKEN * max_text_len
    for label, word in zip(every, words, strict=True):
        if len(word) > most:
            raise ValueError(
                f"The label {shorten(label)} has {len(label)} characters but a prompt of {max_text_len} tokens takes "
                f"at most {most}; shorten it."
            )
    tokenized = []
    for label, tokens in zip(every, tokenizer(words, add_special_tokens=False)["input_ids"], strict=True):
        tokenized.append([token for token in tokens if token not in special] + [period])
        if len(tokenized[-1]) == 1:
            raise ValueError(f"The label {shorten(label)} has nothing to look for in it; use words.")
        if len(tokenized[-1]) > room:
            raise ValueError(
                f"The label {shorten(label)} has {len(tokenized[-1]) - 1} tokens but a prompt of {max_text_len} takes "
                f"at most {room - 1}; shorten it."
            )
    taken = sum(len(tokens) for tokens in tokenized[len(positives) :])
    longest = max(range(len(positives)), key=lambda index: len(tokenized[index]))
    if taken + len(tokenized[longest]) > room:
        raise ValueError(
            f"The negative labels have {taken} tokens and the label {shorten(every[longest])} has "
            f"{len(tokenized[longest])}, but a prompt of {max_text_len} holds {room} and every prompt needs the "
            "negative labels; give fewer of them."
        )
    groups: list[list[int]] = [[]]
    used = taken
    for index in range(len(positives)):
        if used + len(tokenized[index]) > room:
            groups.append([])
            used = taken
        groups[-1].append(index)
        used += len(tokenized[index])
    negatives_at = list(range(len(positives), len(every)))
    chunks = tuple(_chunk([*group, *negatives_at], tokenized, start, end) for group in groups)
    return Prompt(tuple(every), len(negatives), chunks)


def _chunk(indices: list[int], tokenized: Sequence[Sequence[int]], start: int, end: int) -> PromptChunk:
    """One prompt of some labels, whose tokens end in a period."""
    ids, spans = [start], []
    for index in indices:
        spans.append((len(ids), len(ids) + len(tokenized[index]) - 1))
        ids += tokenized[index]
    return PromptChunk((*ids, end), tuple(indices), tuple(spans))


def special_token_ids(tokenizer: Any) -> list[int]:
    """Ids of [CLS], [SEP], "." and "?" in a tokenizer, as config.special_token_ids wants them.

    Args:
        tokenizer: Tokenizer of the model's text encoder.

    Returns:
        The ids, "?" only where the vocabulary holds it.

    Raises:
        ValueError: The tokenizer has no token to begin, end or part a prompt with.
    """
    start = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    period, question = (tokenizer.convert_tokens_to_ids(mark) for mark in (".", "?"))
    unknown = (None, tokenizer.unk_token_id)
    if start is None or end is None or period in unknown:
        raise ValueError(
            f"{type(tokenizer).__name__} has no [CLS], [SEP] or '.' token, that make a prompt; use another encoder."
        )
    return [start, end, period, *([] if question in unknown else [question])]


def spans_from_ids(input_ids: Sequence[int], special_ids: Sequence[int], num_tokens: int) -> list[tuple[int, int]]:
    """(start, end) of the phrases of one row of tokens, for prompts that were not built here.

    Args:
        input_ids: Tokens of one prompt.
        special_ids: Ids that separate phrases.
        num_tokens: Number of real tokens.

    Returns:
        Spans in order.
    """
    spans, start = [], None
    for place, token in enumerate([*input_ids[:num_tokens], special_ids[0]]):
        if token in special_ids:
            if start is not None:
                spans.append((start, place))
            start = None
        elif start is None:
            start = place
    return spans


def shorten(value: object, limit: int = 40) -> str:
    """A value as a message shows it.

    Args:
        value: Anything.
        limit: Most characters.

    Returns:
        Its repr, cut where it is longer.
    """
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except (ValueError, RecursionError):
        # An integer of thousands of digits has no decimal form in Python.
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."
