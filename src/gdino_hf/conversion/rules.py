"""The named rules of the key tables: how a tensor changes between another layout and ours, in both directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FILLS: dict[str, Callable[..., Tensor]] = {"ones": torch.ones, "zeros": torch.zeros}
"""Rules for tensors of ours that a source may lack: the function that fills them."""

ASIDE = ("keep", "drop")
"""Rules for tensors without a counterpart: "keep" stores them beside the model for converting back, "drop" does not."""

# Swin's patch merging concatenates the channels of four neighbouring pixels. Ours orders them pixel by pixel, down the
# columns: (0, 0), (1, 0), (0, 1), (1, 1). mmdetection uses F.unfold: channel by channel, pixels along the rows.
_COLUMN_AND_ROW_ORDER = [0, 2, 1, 3]


class Rule(NamedTuple):
    """How the values of a tensor change between the two layouts.

    Attributes:
        to_theirs: Computes their tensor from ours (a list of one, or of query, key and value).
        to_ours: Computes our tensors from theirs. None if theirs is derived from ours and adds no information: a copy,
            or a table that follows from a size.
    """

    to_theirs: Callable[[list[Tensor]], Tensor]
    to_ours: Callable[[Tensor], list[Tensor]] | None

    @property
    def derived(self) -> bool:
        """Whether the other layout's tensor can be computed from ours, so that it need not be stored."""
        return self.to_ours is None


def _split(theirs: Tensor) -> list[Tensor]:
    if theirs.ndim == 0 or theirs.shape[0] % 3 != 0:
        raise ValueError("the first dimension cannot be split into query, key and value")
    return list(theirs.chunk(3))


def _to_unfold_order(ours: Tensor) -> Tensor:
    """Reorder (..., 4 * C), pixel by pixel, into (..., C * 4), channel by channel."""
    pixels = ours.reshape(*ours.shape[:-1], 4, ours.shape[-1] // 4)
    return pixels[..., _COLUMN_AND_ROW_ORDER, :].transpose(-1, -2).reshape(ours.shape)


def _from_unfold_order(theirs: Tensor) -> Tensor:
    """Invert `_to_unfold_order`."""
    pixels = theirs.reshape(*theirs.shape[:-1], theirs.shape[-1] // 4, 4).transpose(-1, -2)
    return pixels[..., _COLUMN_AND_ROW_ORDER, :].reshape(theirs.shape)


def _relative_position_index(bias_table: Tensor) -> Tensor:
    """Return the (W * W, W * W) index of a Swin window of side W into its ((2W - 1)^2, heads) bias table."""
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
"""The rules by name; keys/original.txt says in words what each does."""
