"""Training prompts with negative labels: the names of an image among names that it does not contain."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..model.text_prompt import name_key


class PromptSampler:
    """Sample the labels of a training prompt: every name of the image, then absent ones, in random order.

    Without absent names a model learns that everything it is asked for is present; without random order it learns
    positions instead of words. The number of labels varies because it does at inference too.

    Args:
        vocabulary: Names to draw negatives from. Every image must be annotated exhaustively for all of them, except
            where its row says which names are absent (`neg_names`).
        num_labels: Minimum and maximum number of labels in a prompt. An image with more names keeps all of them.

    Raises:
        ValueError: The vocabulary is empty or the bounds are not 1 <= minimum <= maximum.
    """

    def __init__(self, vocabulary: Sequence[str], num_labels: tuple[int, int] = (12, 48)) -> None:
        if not vocabulary:
            raise ValueError("The vocabulary of negative labels is empty; pass the names of the data set.")
        if not 1 <= num_labels[0] <= num_labels[1]:
            raise ValueError(f"num_labels must be (minimum, maximum) with 1 <= minimum <= maximum, got {num_labels}.")
        self.vocabulary = list(dict.fromkeys(vocabulary))
        self.num_labels = num_labels

    def __call__(self, names: Sequence[str], rng: random.Random, absent: Sequence[str] | None = None) -> list[str]:
        """Sample the labels of one prompt.

        Args:
            names: Names of the image's boxes, with repetitions; may be empty.
            rng: Random generator.
            absent: Names that are known not to be in the image, to draw from in place of the vocabulary.

        Returns:
            Distinct labels that include all of `names`. Empty if there are neither names nor absent ones to draw.
        """
        positives = list(dict.fromkeys(names))
        wanted = rng.randint(*self.num_labels)
        # Names are compared without case: "Cat" as a negative for a "cat" image would punish the right answer.
        held = {name_key(name) for name in positives}
        others = self.vocabulary if absent is None else list(dict.fromkeys(absent))
        others = [name for name in others if name_key(name) not in held]
        labels = positives + rng.sample(others, min(len(others), max(0, wanted - len(positives))))
        rng.shuffle(labels)
        return labels
