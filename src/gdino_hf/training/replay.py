"""Replay: images of an older data set mixed into training, so that the model does not forget it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]

_REPLAYED = "replayed"


class RowsWithReplay:
    """Rows of the new data set followed by those of the replayed one; "replayed" says which of the two a row is from.

    Args:
        rows: Rows to learn.
        replay: Rows that must not be forgotten.
    """

    def __init__(self, rows: Any, replay: Any) -> None:
        self.rows, self.replay = rows, replay

    def __len__(self) -> int:
        return len(self.rows) + len(self.replay)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self.rows):
            return {**self.rows[index], _REPLAYED: False}
        return {**self.replay[index - len(self.rows)], _REPLAYED: True}

    def cast_column(self, name: str, feature: Any) -> RowsWithReplay:
        """Cast a column of both data sets; `ReproducibleDataset` does this to name an image that cannot be read."""
        return RowsWithReplay(self.rows.cast_column(name, feature), self.replay.cast_column(name, feature))

    def weights(self, share: float) -> list[float]:
        """Return how often each row is sampled per epoch: every new row once, replayed ones up to the given share.

        Args:
            share: Share of replayed rows among all sampled rows, above 0 and below 1.

        Returns:
            One weight per row.
        """
        num_replayed = max(1.0, len(self.rows) * share / (1 - share))
        return [1.0] * len(self.rows) + [num_replayed / len(self.replay)] * len(self.replay)


class ReplayCollator:
    """Collate new and replayed rows with separate collators, and join the results into one batch.

    Args:
        collator: Collator for new rows.
        replay_collator: Collator for replayed rows.
    """

    def __init__(self, collator: Collator, replay_collator: Collator) -> None:
        self.collator, self.replay_collator = collator, replay_collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            rows: Rows of a `RowsWithReplay`.

        Returns:
            The model's inputs, new rows first.
        """
        batches = []
        for replayed, collator in ((False, self.collator), (True, self.replay_collator)):
            own = [row for row in rows if row[_REPLAYED] == replayed]
            if own:
                batches.append(collator(own))
        return join_batches(batches)


def join_batches(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Concatenate batches of different sizes, padding tensors with zeros at the right and the bottom.

    Args:
        batches: Inputs of the model, with equal keys.

    Returns:
        The inputs of all batches together.

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
            joined[key] = torch.cat([_pad(value, sizes) for value in values])
        else:
            joined[key] = [item for value in values for item in value]
    return joined


def _pad(tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Pad all axes but the first with zeros at their end, up to `sizes`."""
    # F.pad takes (before, after) pairs from the last axis to the first.
    padding = [amount for axis, size in enumerate(sizes, 1) for amount in (size - tensor.shape[axis], 0)]
    return F.pad(tensor, padding[::-1])
