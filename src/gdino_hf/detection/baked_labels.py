"""Labels asked of an exported model whose labels are baked in, found in its prompt by their tokens. No torch."""

from __future__ import annotations

from typing import Any

from ..model.printable import printable
from ..model.text_prompt import Prompt, PromptChunk, label_tokens, shorten
from .exported_folder import ExportedFolder, ExportError

_MOST_NAMES = 10


def in_baked_prompt(folder: ExportedFolder, prompt: Prompt, tokenizer: Any) -> tuple[PromptChunk, ...]:
    """Return the chunks of a prompt with the spans that its phrases have in the prompt that was baked in.

    Args:
        folder: Folder of such a model.
        prompt: What to look for: all or some of its labels, in any order and with names of their own.
        tokenizer: The folder's tokenizer.

    Returns:
        The chunks, which have no tokens of their own.

    Raises:
        ExportError: A phrase is not among those that were baked in.
    """
    assert folder.labels is not None
    known = folder.labels.span_of_phrase
    chunks = []
    for chunk in prompt.chunks:
        spans = []
        for index, (start, end) in zip(chunk.label_indices, chunk.spans, strict=True):
            tokens = chunk.input_ids[start:end]
            if tokens not in known:
                raise ExportError(unknown_label(folder, _text(prompt.labels[index], tokens, tokenizer)))
            spans.append(known[tokens])
        chunks.append(PromptChunk((), chunk.label_indices, tuple(spans)))
    return tuple(chunks)


def _text(label: str, tokens: tuple[int, ...], tokenizer: Any) -> str:
    """Return what stands in a prompt: the label itself, or an alias or a template's text with these tokens."""
    (own,) = label_tokens([label], tokenizer)
    return label if tuple(own) == tokens else str(tokenizer.decode(list(tokens)))


def unknown_label(folder: ExportedFolder, text: str) -> str:
    """Return the sentence about a text that was not baked in.

    Args:
        folder: Folder of a model whose labels are baked in.
        text: What was asked for.
    """
    assert folder.labels is not None
    names = folder.labels.names
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    known = ", ".join(shorten(name) for name in names[:_MOST_NAMES])
    return (
        f"{shorten(text)} is not among the {len(names)} labels that {printable(folder.path)} was exported with "
        f"({known}{more}); ask for these, or export the model again with --labels."
    )
