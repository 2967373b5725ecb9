"""The named rules of the key tables: what happens to a tensor between another project's layout and ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FILLS: dict[str, Callable[..., Tensor]] = {"ones": torch.ones, "zeros": torch.zeros}
"""Rules for tensors of ours that a source may lack, by what they are filled with."""

ASIDE = ("keep", "drop")
"""Rules for tensors without a place on the other side: kept beside the model for the way back, or gone for good."""

# Patch merging joins the four pixels of a square. Ours goes through them column by column and lays their channels one
# after the other; mmdetection unfolds: row by row, the four values of a channel side by side.
_COLUMN_AND_ROW_ORDER = [0, 2, 1, 3]


class Rule(NamedTuple):
    """How tensors go over.

    Attributes:
        to_theirs: Our tensors (one, or query, key and value) to theirs.
        to_ours: The way back, one tensor to a list; None where theirs says nothing that ours does not: a copy, or a
            table that follows from sizes.
    """

    to_theirs: Callable[[list[Tensor]], Tensor]
    to_ours: Callable[[Tensor], list[Tensor]] | None

    @property
    def derived(self) -> bool:
        """Whether their tensor follows from ours, so that nothing is lost without it."""
        return self.to_ours is None


def _split(theirs: Tensor) -> list[Tensor]:
    if theirs.ndim == 0 or theirs.shape[0] % 3 != 0:
        raise ValueError("query, key and value do not part evenly")
    return list(theirs.chunk(3))


def _to_unfold_order(ours: Tensor) -> Tensor:
    """(..., 4 * C), pixels one after the other, to (..., C * 4), channels one after the other."""
    pixels = ours.reshape(*ours.shape[:-1], 4, ours.shape[-1] // 4)
    return pixels[..., _COLUMN_AND_ROW_ORDER, :].transpose(-1, -2).reshape(ours.shape)


def _from_unfold_order(theirs: Tensor) -> Tensor:
    """The inverse of `_to_unfold_order`."""
    pixels = theirs.reshape(*theirs.shape[:-1], theirs.shape[-1] // 4, 4).transpose(-1, -2)
    return pixels[..., _COLUMN_AND_ROW_ORDER, :].reshape(theirs.shape)


def _relative_position_index(bias_table: Tensor) -> Tensor:
    """(W * W, W * W): for two places of a Swin window of side W the row of their ((2W - 1)^2, heads) bias table."""
    side = math.isqrt(bias_table.shape[0])
    window = (side + 1) // 2
    rows, columns = (
        axis.flatten() for axis in torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    )
    down = rows[:, None] - rows[None, :] + window - 1
    right = columns[:, None] - columns[None, :] + window - 1
    return down * side + right


RULES: dict[str, Rule] = {
    "rename": Rule(lambda ours: ours[0], lambda theirs: [theirs]),
    "fused": Rule(lambda ours: torch.cat(ours), _split),
    "unfold": Rule(lambda ours: _to_unfold_order(ours[0]), lambda theirs: [_from_unfold_order(theirs)]),
    "scalar": Rule(lambda ours: ours[0].reshape(1), lambda theirs: [theirs.reshape(())]),
    "copy": Rule(lambda ours: ours[0], None),
    "scalar copy": Rule(lambda ours: ours[0].reshape(1), None),
    "index": Rule(lambda ours: _relative_position_index(ours[0]), None),
    "positions": Rule(lambda ours: torch.arange(ours[0].shape[0])[None], None),
    "ones": Rule(lambda ours: ours[0], lambda theirs: [theirs]),
    "zeros": Rule(lambda ours: ours[0], lambda theirs: [theirs]),
}
"""Rules by the name the tables use: renamed; query, key and value in one tensor; mmdetection's order of merged patches;
a scalar stored with shape [1]; copies of a tied tensor; Swin's relative positions; position ids; and filled where the
source has none."""
