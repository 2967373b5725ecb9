"""Choosing the labels of a training prompt: as many as fit, positives first, each only once."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Any

from ..error_text import reason
from ..model.text_prompt import build_prompt, name_key

logger = logging.getLogger(__name__)

_Key = tuple[int, ...]


class PromptPacker:
    """Fits labels into prompts of limited length, measured in the tokens they really have.

    Args:
        tokenizer: Tokenizer of the model's text encoder.
        max_text_len: Maximum number of tokens in a prompt.
    """

    def __init__(self, tokenizer: Any, max_text_len: int) -> None:
        self.tokenizer = tokenizer
        self.max_text_len = max_text_len
        # Every prompt also holds [CLS] and [SEP].
        self.room = max_text_len - 2
        self._known: dict[str, tuple[_Key, int] | None] = {}
        self._overflow_named = False

    def choose(self, labels: Sequence[str], positives: Sequence[str], rng: random.Random, turn: int) -> list[str]:
        """Choose the labels of one prompt.

        If all labels fit, all are chosen. Otherwise absent labels are dropped at random. If not even the positives
        fit, no absent label is chosen: the positives are split into groups that fit, `turn` selects a group, and
        other positives fill the remaining space, so that over as many epochs as there are groups every positive is
        trained on.

        Args:
            labels: Labels to choose from; they include the positives, in any spelling.
            positives: Names of the image's boxes.
            rng: Random generator.
            turn: Number that selects the group of positives, usually the epoch.

        Returns:
            Distinct labels in the given order. A label too long for any prompt is logged once and dropped.
        """
        # Groups must stay the same in every epoch, so they follow the order of the row's names, not of the prompt.
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
        """Return what identifies a label to the model: its tokens in lower case.

        Args:
            label: The label.

        Returns:
            The tokens, equal for labels the model cannot tell apart, or None if no prompt can hold the label.
        """
        found = self._look_up(label)
        return None if found is None else found[0]

    def _within(
        self, known: dict[_Key, tuple[str, int]], positives: list[_Key], rng: random.Random, turn: int
    ) -> set[_Key]:
        """Choose labels that fit the prompt when not all of them do."""
        groups = pack([known[key][1] for key in positives], self.room)
        if len(groups) > 1:
            if not self._overflow_named:
                self._overflow_named = True
                logger.warning(
                    "An image has %d labels, which do not fit a prompt of %d tokens: the labels and their boxes take "
                    "turns over the epochs. Further such images are not reported.",
                    len(positives),
                    self.max_text_len,
                )
            # This turn's group comes first, then the positives after it fill the remaining space.
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
        """Return a label's key and its number of tokens, including its period."""
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
    """Split a sequence into consecutive groups that fit, filling each before the next is begun.

    Args:
        lengths: Number of tokens of each element.
        room: Maximum number of tokens in a group; a longer element gets a group of its own.

    Returns:
        Indices of each group's elements; always at least one group.
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
