"""Training prompts: the names an image holds among names it does not hold."""

from __future__ import annotations

import random
from collections.abc import Sequence


class PromptSampler:
    """Draws the labels of a training prompt: every name of the image, then absent ones, in random order.

    Without absent names a model learns that whatever is asked for is there; without random order it learns
    positions instead of words. The number of labels varies, since at detection time it does too.

    Args:
        vocabulary: Names that may serve as negatives; an image must be annotated exhaustively for them.
        num_labels: Least and most labels of a prompt. An image with more names than that keeps all of its own.

    Raises:
        ValueError: The vocabulary is empty or the bounds are not 1 <= least <= most.
    """

    def __init__(self, vocabulary: Sequence[str], num_labels: tuple[int, int] = (12, 48)) -> None:
        if not vocabulary:
            raise ValueError("The vocabulary of negative labels is empty; pass the names of the data set.")
        if not 1 <= num_labels[0] <= num_labels[1]:
            raise ValueError(f"num_labels must be (least, most) with 1 <= least <= most, got {num_labels}.")
        self.vocabulary = list(dict.fromkeys(vocabulary))
        self.num_labels = num_labels

    def __call__(self, names: Sequence[str], rng: random.Random) -> list[str]:
        """Labels of one prompt.

        Args:
            names: Names of the image's boxes, with repetitions; may be empty.
            rng: Source of randomness.

        Returns:
            Distinct labels, all of `names` among them.
        """
        positives = list(dict.fromkeys(names))
        wanted = rng.randint(*self.num_labels)
        # Compared without case: "Cat" as a negative of a "cat" image would punish the right answer.
        held = {name_key(name) for name in positives}
        absent = [name for name in self.vocabulary if name_key(name) not in held]
        labels = positives + rng.sample(absent, min(len(absent), max(0, wanted - len(positives))))
        rng.shuffle(labels)
        # An image without boxes and a vocabulary of its own names only: still a prompt.
        return labels


def name_key(name: str) -> str:
    """What two spellings of one name share: the processor compares names this way too."""
    return " ".join(name.lower().split())
