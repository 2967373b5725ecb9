"""Checks of a data set's names against a tokenizer: names without a known word, and names it cannot tell apart."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..model.label_faults import labels_alike
from ..model.text_prompt import is_unknown, label_tokens, name_key, shorten
from .faults import Report

UNKNOWN, HALF_KNOWN, EQUAL_TOKENS = "unknown names", "half-known names", "names of equal tokens"

# A longer word is unknown to BERT's tokenizer, whatever its letters.
_LONGEST_WORD = 100
_PUBLISHED = Path(__file__).resolve().parents[1] / "checkpoints" / "gdino-nano"


def check_name_tokens(names: Sequence[str], tokenizer: Any, add: Report) -> None:
    """Report names that a model cannot read or tell apart.

    Args:
        names: Distinct names of classes.
        tokenizer: The model's tokenizer; None for that of the published models, which is loaded only if a name has
            other characters than ASCII or a very long word.
        add: Function that is told the kind of a fault and the name.
    """
    if tokenizer is None:
        if all(name.isascii() and all(len(word) <= _LONGEST_WORD for word in name.split()) for name in names):
            return
        tokenizer = _published_tokenizer()
    if not names:
        return
    tokens = label_tokens(names, tokenizer)
    for name, ids in zip(names, tokens, strict=True):
        if is_unknown(ids, tokenizer):
            add(UNKNOWN, shorten(name))
        elif tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            add(HALF_KNOWN, shorten(name))
    known = [(name, tuple(ids)) for name, ids in zip(names, tokens, strict=True) if not is_unknown(ids, tokenizer)]
    for group in labels_alike([name for name, _ in known], [ids for _, ids in known]):
        # Names that differ in case or blanks only are a finding of their own.
        if len({name_key(name) for name in group}) > 1:
            add(EQUAL_TOKENS, " = ".join(map(shorten, group)))


@functools.lru_cache(maxsize=1)
def _published_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_PUBLISHED)
