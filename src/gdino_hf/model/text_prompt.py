"""Label text to labels, and labels to the tokens of prompts.

`split_labels` is the only parser of label text: Python, the command, the web page and the pipeline all call it.
"""

import re
from collections.abc import KeysView, Sequence, ValuesView
from dataclasses import dataclass
from typing import Any

from .printable import printable
from .size_limits import SHORTEST_PROMPT

# Words of every language have fewer characters per token; a longer text is not a label.
CHARACTERS_PER_TOKEN = 16

_PERIODS = r".。．｡"
_COMMAS = r",，、､،"
_LINE_BREAKS = r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"
# A decimal point; an abbreviated title or place; single letters joined by periods.
_PERIOD_INSIDE = r"(?<=\d)\.(?=\d)|(?<!\w)(?:(?:st|mt|dr|mr|mrs|ms|jr|sr)\.|(?:[a-z]\.)+[a-z](?!\w)\.?)"
_LABEL = re.compile(rf"(?:{_PERIOD_INSIDE}|[^{_PERIODS}{_COMMAS}{_LINE_BREAKS}])+", re.IGNORECASE)
# Blanks that str.split does not know: the zero-width space and the byte order mark.
_UNSEEN_BLANKS = str.maketrans("\u200b\ufeff", "  ")


@dataclass(frozen=True)
class PromptChunk:
    """Labels that share one prompt, and its tokens.

    Attributes:
        input_ids: Tokens of "[CLS] label . label . [SEP]".
        label_indices: Index into `Prompt.labels` of the label of each phrase; every chunk has the negative labels. A
            label with several texts has several phrases.
        spans: (start, end) tokens of each phrase.
    """

    input_ids: tuple[int, ...]
    label_indices: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Prompt:
    """The labels to look for in one image, and their tokens.

    Attributes:
        labels: The caller's labels in the caller's spelling, negative labels last.
        num_negatives: Number of labels that compete for boxes but are left out of results.
        chunks: The tokens; several chunks if the labels do not fit into one prompt.
        offsets: (start, end) characters of each token of a caption; None for a prompt made from labels.
    """

    labels: tuple[str, ...]
    num_negatives: int
    chunks: tuple[PromptChunk, ...]
    offsets: tuple[tuple[int, int], ...] | None = None

    @property
    def num_positives(self) -> int:
        """Number of labels that may appear in results."""
        return len(self.labels) - self.num_negatives


def split_labels(text: str) -> list[str]:
    """Split label text into labels.

    The rule, wherever label text is typed: commas, periods and line breaks separate labels, also in their full-width
    and ideographic forms; the last separator may be left out. "cat, remote control", "a cat. a dog." and "a cat. a dog"
    have two labels each. A period does not separate

    - between digits: "3.5 mm jack";
    - after st, mt, dr, mr, mrs, ms, jr or sr: "St. Bernard";
    - between single letters written without blanks, nor after the last of them: "U.S. flag".

    Blanks around a label go, several inside it become one, empty labels go, and of equal labels the first stays. Case,
    quotes and all other characters stay. A label that has a comma or another period inside is given in a list, or on a
    line of a label file.

    Args:
        text: Any text.

    Returns:
        The labels in order, each once; an empty list if the text has none.
    """
    labels = (" ".join(label.translate(_UNSEEN_BLANKS).split()) for label in _LABEL.findall(text))
    return list(dict.fromkeys(label for label in labels if label))


def parse_labels(labels: str | Sequence[str]) -> list[str]:
    """Return labels as a list.

    Args:
        labels: Label text, which `split_labels` splits, or a list with one label per element; also an array or a
            column of a table, or the keys or values of a dict.

    Returns:
        The labels without blanks around them; those of a list may hold any separator and may be equal.

    Raises:
        TypeError: labels is neither a string nor a sequence of strings.
        ValueError: There is no label, one in a list is empty, or one holds bytes that are not UTF-8.
    """
    labels = as_sequence(labels)
    if isinstance(labels, str):
        found = split_labels(labels)
        if not found:
            raise ValueError(f"The text {shorten(labels)} names nothing; write for instance 'cat, remote control'.")
        return [check_characters(label, "label") for label in found]
    if not isinstance(labels, Sequence) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f"Labels must be a string or a list of strings, got {shorten(labels)}.")
    if len(labels) == 0:
        raise ValueError("The list of labels is empty; name at least one thing to look for.")
    stripped = [label.strip() for label in labels]
    if not all(stripped):
        raise ValueError(f"Label {stripped.index('')} is empty; leave it out or name something.")
    return [check_characters(label, "label") for label in stripped]


def as_sequence(labels: Any) -> Any:
    """Return an array or column as a list, and the keys or values of a dict, which have an order; all else as it is."""
    if isinstance(labels, (KeysView, ValuesView)):
        return list(labels)
    # numpy, torch, pandas and polars.
    to_list = getattr(labels, "tolist", None) or getattr(labels, "to_list", None)
    return to_list() if callable(to_list) and not isinstance(labels, (str, type)) else labels


def check_prompt_length(max_text_len: Any) -> int:
    """Return the largest number of tokens in a prompt.

    Args:
        max_text_len: A whole number; a prompt has at least [CLS], one token, a period and [SEP].

    Raises:
        ValueError: It is no whole number, or below `SHORTEST_PROMPT`.
    """
    if isinstance(max_text_len, bool) or not isinstance(max_text_len, int) or max_text_len < SHORTEST_PROMPT:
        raise ValueError(
            f"max_text_len is {shorten(max_text_len)}; give the number of tokens of the longest prompt, at least "
            f"{SHORTEST_PROMPT}: [CLS], one token, a period and [SEP]."
        )
    return max_text_len


def check_characters(text: str, kind: str) -> str:
    """Return text that tokenizers can read.

    Args:
        text: The text to check.
        kind: What it is, for the message.

    Returns:
        The text.

    Raises:
        ValueError: It holds lone surrogates, which stand for bytes that are not UTF-8.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"The {kind} {shorten(text)} holds bytes that are not UTF-8; write it in UTF-8.")
    return text


def name_key(name: str) -> str:
    """Normalize a class name for comparison: lower case, single blanks."""
    return " ".join(name.lower().split())


def build_prompt(
    labels: str | Sequence[str],
    tokenizer: Any,
    max_text_len: int = 256,
    negative_labels: str | Sequence[str] = (),
    *,
    texts: Sequence[Sequence[str]] | None = None,
    labels_per_prompt: int | None = None,
) -> Prompt:
    """Pack labels into prompts in order; no label is cut, and a period closes every label.

    Labels compete for a box only inside one prompt, so every chunk has all negative labels. This is the one place that
    decides which labels share a prompt.

    Periods and question marks inside a label would split it, so they become blanks in the prompt; results still carry
    the label as it was given.

    Args:
        labels: A list, or text for `split_labels`.
        tokenizer: Tokenizer of the model's text encoder.
        max_text_len: Largest number of tokens in one prompt.
        negative_labels: Labels that compete for boxes but are left out of results, in the same forms as labels.
        texts: What prompts hold for each label and then for each negative label: one or more texts, all of which stay
            in one prompt. None for the labels themselves. `PromptChunk.label_indices` repeats a label's index for each
            of its texts.
        labels_per_prompt: Largest number of labels in one prompt, negative labels not counted; None for as many as
            fit.

    Returns:
        The prompt.

    Raises:
        TypeError: A label is not a string.
        ValueError: There is no label, or a label is empty, has no letters, has no word that the tokenizer knows, or is
            too long for a prompt that also holds the negative labels; or a number does not fit.
    """
    check_prompt_length(max_text_len)
    positives = parse_labels(labels)
    negatives = parse_labels(negative_labels) if len(negative_labels) > 0 else []
    every = positives + negatives
    written = [[label] for label in every] if texts is None else [parse_labels(list(of_one)) for of_one in texts]
    if len(written) != len(every):
        raise ValueError(f"There are texts for {len(written)} labels but {len(every)} labels; give one list each.")
    if labels_per_prompt is not None and labels_per_prompt < 1:
        raise ValueError(f"labels_per_prompt is {labels_per_prompt}; give at least 1, or None for as many as fit.")
    special = special_token_ids(tokenizer)
    start, end, period = special[:3]
    flat = [text for of_one in written for text in of_one]
    tokenized = iter(_closed_tokens(flat, tokenizer, max_text_len, period))
    phrases = [[next(tokenized) for _ in of_one] for of_one in written]
    lengths = [sum(map(len, of_one)) for of_one in phrases]
    room = max_text_len - 2
    taken = sum(lengths[len(positives) :])
    longest = max(range(len(positives)), key=lambda index: lengths[index])
    if taken + lengths[longest] > room:
        if not negatives:
            raise ValueError(
                f"The {len(written[longest])} texts of the label {shorten(every[longest])} have {lengths[longest]} "
                f"tokens, but a prompt of {max_text_len} holds {room}, and the texts of a label stay in one prompt; "
                "give it fewer."
            )
        raise ValueError(
            f"The negative labels have {taken} tokens and the label {shorten(every[longest])} has "
            f"{lengths[longest]}, but a prompt of {max_text_len} holds {room} and every prompt needs the "
            "negative labels; give fewer of them."
        )
    groups: list[list[int]] = [[]]
    used = taken
    for index in range(len(positives)):
        if used + lengths[index] > room or len(groups[-1]) == labels_per_prompt:
            groups.append([])
            used = taken
        groups[-1].append(index)
        used += lengths[index]
    negative_indices = list(range(len(positives), len(every)))
    chunks = tuple(_chunk([*group, *negative_indices], phrases, start, end) for group in groups)
    return Prompt(tuple(every), len(negatives), chunks)


def _closed_tokens(texts: Sequence[str], tokenizer: Any, max_text_len: int, period: int) -> list[list[int]]:
    """Return the tokens of texts, each closed by a period, or raise if a text cannot be in a prompt."""
    room = max_text_len - 2
    # Some tokenizers make one unknown token of an endless word, so characters have a limit too.
    most = CHARACTERS_PER_TOKEN * max_text_len
    for text in texts:
        if len(_words(text)) > most:
            raise ValueError(
                f"The label {shorten(text)} has {len(text)} characters but a prompt of {max_text_len} tokens takes "
                f"at most {most}; shorten it."
            )
    closed = []
    for text, tokens in zip(texts, label_tokens(texts, tokenizer), strict=True):
        closed.append([*tokens, period])
        if len(closed[-1]) == 1:
            raise ValueError(f"The label {shorten(text)} has nothing to look for in it; use words.")
        if len(closed[-1]) > room:
            raise ValueError(
                f"The label {shorten(text)} has {len(closed[-1]) - 1} tokens but a prompt of {max_text_len} takes "
                f"at most {room - 1}; shorten it."
            )
    unknown = [shorten(text) for text, tokens in zip(texts, closed, strict=True) if is_unknown(tokens, tokenizer)]
    if unknown:
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise ValueError(
            f"The tokenizer knows no word of the label{'s' * (len(unknown) > 1)} {', '.join(unknown[:10])}{more}; use "
            "words of its vocabulary, which is English in the published models."
        )
    return closed


def _words(label: str) -> str:
    """Return a label without the marks that would end it inside a prompt."""
    return " ".join(label.replace(".", " ").replace("?", " ").split())


def label_tokens(labels: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the tokens of labels as prompts hold them, without the periods that close them.

    Args:
        labels: At least one label.
        tokenizer: Tokenizer of the model's text encoder.

    Returns:
        The tokens of each label; none for a label of marks only.
    """
    special = special_token_ids(tokenizer)
    tokenized = tokenizer([_words(label) for label in labels], add_special_tokens=False, verbose=False)["input_ids"]
    return [[token for token in tokens if token not in special] for tokens in tokenized]


def is_unknown(tokens: Sequence[int], tokenizer: Any) -> bool:
    """Return whether a label is one or more unknown tokens, at most with punctuation around them.

    Args:
        tokens: The label's tokens.
        tokenizer: The tokenizer that made them.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown not in tokens:
        return False
    known = tokenizer.convert_ids_to_tokens([token for token in tokens if token != unknown])
    return not any(character.isalnum() for token in known for character in token)


def _chunk(indices: list[int], phrases: Sequence[Sequence[Sequence[int]]], start: int, end: int) -> PromptChunk:
    """Join the phrases of some labels, each of which ends with a period, into one prompt."""
    ids, spans, owners = [start], [], []
    for index in indices:
        for tokens in phrases[index]:
            owners.append(index)
            spans.append((len(ids), len(ids) + len(tokens) - 1))
            ids += tokens
    return PromptChunk((*ids, end), tuple(owners), tuple(spans))


def special_token_ids(tokenizer: Any) -> list[int]:
    """Return the ids of [CLS], [SEP], "." and "?" in a tokenizer, as `GDinoConfig.special_token_ids` expects them.

    Args:
        tokenizer: Tokenizer of the model's text encoder.

    Returns:
        The ids in this order; "?" only if the vocabulary has it.

    Raises:
        ValueError: The tokenizer has no token to begin, end or separate a prompt's phrases with.
    """
    start = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    period, question = (tokenizer.convert_tokens_to_ids(mark) for mark in (".", "?"))
    unknown = (None, tokenizer.unk_token_id)
    if start is None or end is None or period in unknown:
        raise ValueError(
            f"{type(tokenizer).__name__} lacks a [CLS], [SEP] or '.' token, which every prompt needs; use another "
            "encoder."
        )
    return [start, end, period, *([] if question in unknown else [question])]


def spans_from_ids(input_ids: Sequence[int], special_ids: Sequence[int], num_tokens: int) -> list[tuple[int, int]]:
    """Return the (start, end) tokens of the phrases in one row of ids, for prompts not made by `build_prompt`.

    Args:
        input_ids: Tokens of one prompt.
        special_ids: Ids that separate phrases.
        num_tokens: Number of real tokens.

    Returns:
        The spans in order.
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
    """Return a value's repr for a message, cut if it is long.

    Args:
        value: Anything.
        limit: Largest number of characters.

    Returns:
        The repr, with "..." at the end where it was cut.
    """
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
        # Tables print several lines.
        text = text if text.isprintable() else printable(" ".join(text.split()))
    except (ValueError, RecursionError):
        # Python refuses to print an integer of thousands of digits.
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."
