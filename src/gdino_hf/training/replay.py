"""A data set with another one mixed in: the new to learn, the old to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]

_SOURCE = "source"


class Mixture:
    """Rows of a data set, then those of another, each with "source", 0 or 1.

    Args:
        rows: What is learned.
        replay: What must not be forgotten.
    """

    def __init__(self, rows: Any, replay: Any) -> None:
        self.rows, self.replay = rows, replay

    def __len__(self) -> int:
        return len(self.rows) + len(self.replay)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self.rows):
            return {**self.rows[index], _SOURCE: 0}
        return {**self.replay[index - len(self.rows)], _SOURCE: 1}

    def cast_column(self, name: str, feature: Any) -> Mixture:
        """As a Dataset's, which `ReproducibleDataset` asks for the file of a picture that cannot be read."""
        return Mixture(self.rows.cast_column(name, feature), self.replay.cast_column(name, feature))

    def weights(self, share: float) -> list[float]:
        """How often a sampler takes each row in an epoch: all that is learned once, and as many replayed as to be this
        share of all.

        Args:
            share: Above 0 and below 1.

        Returns:
            One weight per row.
        """
        replayed = max(1.0, len(self.rows) * share / (1 - share))
        return [1.0] * len(self.rows) + [replayed / len(self.replay)] * len(self.replay)


class MixedCollator:
    """One batch out of rows that each have their own way of becoming one.

    Args:
        *collators: One per data set of the mixture, in its order.
    """

    def __init__(self, *collators: Collator) -> None:
        self.collators = collators

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            rows: Of a `Mixture`.

        Returns:
            The model's inputs, the rows of each data set together.
        """
        batches = []
        for source, collator in enumerate(self.collators):
            own = [row for row in rows if row[_SOURCE] == source]
            if own:
                batches.append(collator(own))
        return join_batches(batches)


def join_batches(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several batches as one, padded with zeros at the right and the bottom.

    Args:
        batches: The model's inputs with equal keys.

    Returns:
        The inputs of all of them.

    Raises:
        ValueError: The keys differ.
    """
    if any(batch.keys() != batches[0].keys() for batch in batches):
        raise ValueError(f"Batches with different keys cannot be joined: {[sorted(batch) for batch in batches]}.")
    joined: dict[str, Any] = {}
    for key in batches[0]:
        values = [batch[key] for batch in batches]
        if isinstance(values[0], torch.Tensor):
            sizes = [max(value.shape[axis] for value in values) for axis in range(1, values[0].ndim)]
            joined[key] = torch.cat([_grow(value, sizes) for value in values])
        else:
            joined[key] = [item for value in values for item in value]
    return joined


def _grow(tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    frame = [amount for axis, size in enumerate(sizes, 1) for amount in (size - tensor.shape[axis], 0)]
    return F.pad(tensor, frame[::-1])
