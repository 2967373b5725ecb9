"""Captions as prompts: from a phrase's characters to its tokens by the tokenizer's offsets, never by text search."""

from collections.abc import Iterable, Sequence
from typing import Any

from .text_prompt import (
    CHARACTERS_PER_TOKEN,
    Prompt,
    PromptChunk,
    check_characters,
    check_prompt_length,
    shorten,
    spans_from_ids,
    special_token_ids,
)


def caption_tokens(caption: str, tokenizer: Any) -> list[tuple[int, int, int]]:
    """Tokenize a caption and return the characters behind every token.

    Args:
        caption: Any text. Periods and question marks separate its phrases.
        tokenizer: Fast tokenizer of the model's text encoder.

    Returns:
        (token, start, end) of each token, without [CLS] and [SEP]; `caption[start:end]` is the token's text.

    Raises:
        TypeError: The caption is not a string.
        ValueError: The tokenizer gives no character offsets, or the caption holds bytes that are not UTF-8.
    """
    if not isinstance(caption, str):
        raise TypeError(f"A caption must be a string, got {shorten(caption)}.")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; load the fast tokenizer.")
    ends = special_token_ids(tokenizer)[:2]
    encoded = tokenizer(
        check_characters(caption, "caption"), add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return [
        (token, start, end)
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        # The literal text "[CLS]" or "[SEP]" in a caption would be tokenized as the beginning or end of a prompt.
        if token not in ends
    ]


def build_caption(caption: str, tokenizer: Any, max_text_len: int = 256) -> Prompt:
    """Build the prompt of one image from a caption; annotations refer to it with `tokens_positive`.

    The prompt's labels are the parts of the caption between periods and question marks, each an attention block. A last
    part without a period gets one.

    Args:
        caption: The text that the annotations' characters index.
        tokenizer: Fast tokenizer of the model's text encoder.
        max_text_len: Largest number of tokens in the prompt.

    Returns:
        A prompt of one chunk, with `offsets`.

    Raises:
        TypeError: The caption is not a string.
        ValueError: The caption has no word, or more tokens than a prompt takes.
    """
    check_prompt_length(max_text_len)
    special = special_token_ids(tokenizer)
    most = CHARACTERS_PER_TOKEN * max_text_len
    if isinstance(caption, str) and len(caption) > most:
        raise ValueError(
            f"The caption {shorten(caption)} has {len(caption)} characters but a prompt of {max_text_len} tokens takes "
            f"at most {most}; shorten it."
        )
    tokens = caption_tokens(caption, tokenizer)
    if tokens and tokens[-1][0] not in special:
        tokens.append((special[2], len(caption), len(caption)))
    if len(tokens) > max_text_len - 2:
        raise ValueError(
            f"The caption {shorten(caption)} has {len(tokens)} tokens but a prompt of {max_text_len} takes at most "
            f"{max_text_len - 2}; shorten it."
        )
    input_ids = (special[0], *(token for token, _, _ in tokens), special[1])
    spans = spans_from_ids(input_ids, special, len(input_ids))
    if not spans:
        raise ValueError(f"The caption {shorten(caption)} has nothing to look for in it; use words.")
    offsets = ((0, 0), *((start, end) for _, start, end in tokens), (len(caption), len(caption)))
    labels = tuple(caption[offsets[start][0] : offsets[end - 1][1]] for start, end in spans)
    chunk = PromptChunk(input_ids, tuple(range(len(spans))), tuple(spans))
    return Prompt(labels, 0, (chunk,), offsets)


def phrase_tokens(prompt: Prompt, characters: Iterable[Sequence[int]]) -> tuple[int, list[int]]:
    """Return the tokens of a phrase of a caption.

    Args:
        prompt: From `build_caption`.
        characters: [start, end) pairs of the caption's characters; a phrase may have several.

    Returns:
        Index of the label in which the phrase begins, and the positions of its tokens in the prompt without delimiters.
        A token that the phrase covers only partly belongs to it.

    Raises:
        ValueError: The prompt was not made by `build_caption`; a pair is not two whole numbers, is empty or leaves the
            caption; or the characters hold no token.
    """
    if prompt.offsets is None:
        raise ValueError("tokens_positive are characters of a caption; give build_caption(text, ...) as the text.")
    length = prompt.offsets[-1][1]
    pairs = list(characters)
    for pair in pairs:
        check_pair(pair, length)
    found = [
        (label, place)
        for label, span in enumerate(prompt.chunks[0].spans)
        for place in range(*span)
        if any(prompt.offsets[place][0] < end and start < prompt.offsets[place][1] for start, end in pairs)
    ]
    if not found:
        raise ValueError(f"The characters {pairs} of the caption hold no word; repair tokens_positive.")
    return found[0][0], [place for _, place in found]


def check_pair(pair: Any, length: int) -> None:
    """Raise if a pair is not a range of a caption's characters.

    Args:
        pair: The value to check, which should be [start, end).
        length: Number of characters in the caption.

    Raises:
        ValueError: The pair is not two whole numbers with 0 <= start < end <= length.
    """
    whole = isinstance(pair, Sequence) and len(pair) == 2 and all(type(number) is int for number in pair)
    if not whole or not 0 <= pair[0] < pair[1] <= length:
        raise ValueError(
            f"The pair {shorten(pair)} of tokens_positive is not [start, end) of a caption of {length} "
            "characters; repair it."
        )
