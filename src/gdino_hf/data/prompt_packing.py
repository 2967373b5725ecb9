"""Which labels a training prompt has: all that fit, positives first, none that the model cannot tell apart."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Any

from ..model.text_prompt import build_prompt
from .negatives import name_key
from .rows import reason

logger = logging.getLogger(__name__)

_Key = tuple[int, ...]


class PromptPacker:
    """Fits labels into prompts of a length, by their real tokens.

    Args:
        tokenizer: Tokenizer of the model's text encoder.
        max_text_len: Most tokens of a prompt.
    """

    def __init__(self, tokenizer: Any, max_text_len: int) -> None:
        self.tokenizer = tokenizer
        self.max_text_len = max_text_len
        # [CLS] and [SEP] stand in every prompt.
        self.room = max_text_len - 2
        self._known: dict[str, tuple[_Key, int] | None] = {}
        self._overflow_named = False

    def choose(self, labels: Sequence[str], positives: Sequence[str], rng: random.Random, turn: int) -> list[str]:
        """Labels of one prompt, none twice.

        Where all labels fit, these are all of them. Where they do not, absent ones are left out at random. Where even
        the positives do not fit, there are no absent ones, and the positives are parted into groups that fit, one
        group a turn with what else fits: over as many epochs as there are groups, each of them is trained on.

        Args:
            labels: What may be asked for, positives among it in any spelling.
            positives: Names of the image's boxes.
            rng: Source of randomness.
            turn: Which group is chosen, the epoch say.

        Returns:
            Labels in the order given. A label that no prompt can hold is named in the log once and left out.
        """
        # In the row's order, not the prompt's, which may be another in each epoch: the groups must stay the same.
        present = list(dict.fromkeys(key for name in positives if (key := self.key(name)) is not None))
        known: dict[_Key, tuple[str, int]] = {}
        for label in [*labels, *positives]:
            found = self._look_up(label)
            if found is not None:
                known.setdefault(found[0], (label, found[1]))
        if sum(length for _, length in known.values()) > self.room:
            taken = self._within(known, present, rng, turn)
            known = {key: value for key, value in known.items() if key in taken}
        return [label for label, _ in known.values()]

    def key(self, label: str) -> _Key | None:
        """What labels share that are one label to the model: its tokens in lower case.

        Args:
            label: Any label.

        Returns:
            The tokens, or None where no prompt can hold the label.
        """
        found = self._look_up(label)
        return None if found is None else found[0]

    def _within(
        self, known: dict[_Key, tuple[str, int]], positives: list[_Key], rng: random.Random, turn: int
    ) -> set[_Key]:
        groups = pack([known[key][1] for key in positives], self.room)
        if len(groups) > 1:
            if not self._overflow_named:
                self._overflow_named = True
                logger.warning(
                    "An image has %d labels that are more than the %d tokens of a prompt: they take turns, and "
                    "their boxes with them. Other such images are not mentioned.",
                    len(positives),
                    self.max_text_len,
                )
            # The group of this turn, and what else fits of those that follow it.
            first = groups[turn % len(groups)][0]
            candidates, taken = positives[first:] + positives[:first], set()
        else:
            absent = [key for key in known if key not in positives]
            candidates, taken = rng.sample(absent, len(absent)), set(positives)
        left = self.room - sum(known[key][1] for key in taken)
        for key in candidates:
            if known[key][1] <= left:
                taken.add(key)
                left -= known[key][1]
        return taken

    def _look_up(self, label: str) -> tuple[_Key, int] | None:
        """Key and number of tokens of a label with its period."""
        if label not in self._known:
            try:
                tokens = build_prompt([label], self.tokenizer, self.max_text_len).chunks[0].input_ids[1:-1]
                lowered = build_prompt([name_key(label)], self.tokenizer, self.max_text_len).chunks[0].input_ids[1:-1]
                self._known[label] = (lowered, len(tokens))
            except ValueError as error:
                logger.warning("A label is left out: %s.", reason(error))
                self._known[label] = None
        return self._known[label]


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Part a sequence into as few runs as hold it.

    Args:
        lengths: Tokens of each member.
        room: Most tokens of a run; a longer member has a run of its own.

    Returns:
        Indices of each run, at least one run.
    """
    groups: list[list[int]] = [[]]
    used = 0
    for index, length in enumerate(lengths):
        if groups[-1] and used + length > room:
            groups.append([])
            used = 0
        groups[-1].append(index)
        used += length
    return groups
