"""Labels that the tokenizer does not know or cannot tell apart, named before they give odd results."""

import warnings
from collections.abc import Sequence
from typing import Any

from .text_prompt import Prompt, shorten

_MOST_NAMED = 10


class LabelWarning(UserWarning):
    """Some labels cannot be told apart, or the tokenizer does not know all of their words."""


def label_remarks(prompt: Prompt, tokenizer: Any) -> list[str]:
    """Return what to know about the labels of a prompt, in at most one sentence of each kind.

    Args:
        prompt: From `build_prompt`.
        tokenizer: The tokenizer it was built with.

    Returns:
        Sentences that name labels with equal tokens, and labels with a word that the tokenizer does not know.
    """
    tokens = tokens_of_labels(prompt)
    remarks = []
    alike = [" = ".join(map(shorten, group)) for group in labels_alike(prompt.labels, tokens)]
    if alike:
        remarks.append(
            f"The model cannot tell these labels apart, because they have the same tokens: {_listed(alike, '; ')}. "
            "Use other words."
        )
    unknown = tokenizer.unk_token_id
    partly = [shorten(label) for label, ids in zip(prompt.labels, tokens, strict=True) if unknown in ids]
    if partly and unknown is not None:
        remarks.append(
            f"The tokenizer does not know every word of these labels, and the model reads only the rest: "
            f"{_listed(list(dict.fromkeys(partly)), ', ')}. Use other words."
        )
    return remarks


def warn_of_labels(prompt: Prompt, tokenizer: Any, stacklevel: int = 2) -> None:
    """Warn of labels that the tokenizer cannot tell apart or does not know in full, as a `LabelWarning`.

    Args:
        prompt: From `build_prompt`.
        tokenizer: The tokenizer it was built with.
        stacklevel: As for `warnings.warn`, counted from the caller.
    """
    for remark in label_remarks(prompt, tokenizer):
        warnings.warn(remark, LabelWarning, stacklevel=stacklevel + 1)


def tokens_of_labels(prompt: Prompt) -> list[tuple[int, ...]]:
    """Return the tokens of each label of a prompt, those of all of its texts, without the closing periods."""
    found: dict[int, list[tuple[int, ...]]] = {index: [] for index in range(len(prompt.labels))}
    for chunk in prompt.chunks:
        for index, (start, end) in zip(chunk.label_indices, chunk.spans, strict=True):
            tokens = chunk.input_ids[start:end]
            if tokens not in found[index]:
                found[index].append(tokens)
    return [tuple(token for tokens in found[index] for token in tokens) for index in range(len(prompt.labels))]


def labels_alike(labels: Sequence[str], tokens: Sequence[tuple[int, ...]]) -> list[list[str]]:
    """Return groups of distinct labels with equal tokens.

    Args:
        labels: Labels.
        tokens: Tokens of each label.

    Returns:
        Groups of at least two labels, in the order of their first labels.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for label, ids in zip(labels, tokens, strict=True):
        group = groups.setdefault(ids, [])
        if label not in group:
            group.append(label)
    return [group for group in groups.values() if len(group) > 1]


def _listed(names: Sequence[str], separator: str) -> str:
    more = f"{separator}and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return separator.join(names[:_MOST_NAMED]) + more
