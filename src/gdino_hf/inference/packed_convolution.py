"""Convolutions on prepacked weights, a few rows of the output at a time, with channels last in memory."""

import math
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .onednn import can_pack_convolutions, pack_convolution, packed_convolution
from .packed_linear import runs_packed, share_state, state_of
from .workers import RowBlocks, run_rows

_WORK = 8e6
"""Multiplications that a block has at least: fewer take less time than handing the block to a thread."""
_BLOCKS = 16
"""Blocks of an image at most."""
_COPIES = 4
"""Packed weights that a layer keeps: one for each size of a strip, of which an image has at most two."""


class PackedConv2d(nn.Conv2d):
    """A convolution that shares another one's parameters and runs on packed weights where possible.

    Args:
        convolution: The layer to replace; its parameters are shared.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        share_state(self, convolution)
        self._packed: tuple[tuple, dict[tuple[int, int], Tensor]] | None = None

    @staticmethod
    def knows(module: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Return whether a module is a convolution that this class computes: zero padding and no dilation."""
        return (
            type(module) is nn.Conv2d
            and module.dilation == (1, 1)
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, N, H', W')."""
        weight = self.weight
        if not runs_packed(x, weight) or x.ndim != 4 or not can_pack_convolutions(x.dtype):
            return super().forward(x)
        stride, padding = cast("tuple[int, int]", self.stride), cast("tuple[int, int]", self.padding)
        # Rows outside the image are added to each strip.
        settings = stride, (0, padding[1]), self.groups
        x = x.contiguous(memory_format=torch.channels_last)
        batch, _, height, width = x.shape
        (kernel, kernel_width), (step, step_across) = self.kernel_size, stride
        rows = (height + 2 * padding[0] - kernel) // step + 1
        columns = (width + 2 * padding[1] - kernel_width) // step_across + 1
        if min(rows, columns) <= 0:
            return super().forward(x)
        output = torch.empty(
            (batch, self.out_channels, rows, columns), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )

        def block(image: int, part: slice) -> None:
            # Rows of the input that these rows of the output read; those outside the image are zero.
            first = part.start * step - padding[0]
            last = (part.stop - 1) * step - padding[0] + kernel
            strip = x[image : image + 1, :, max(0, first) : min(height, last)]
            if first < 0 or last > height:
                strip = F.pad(strip, (0, 0, max(0, -first), max(0, last - height)))
            packed = self._weight_for((strip.shape[2], strip.shape[3]), settings)
            output[image : image + 1, :, part] = packed_convolution(strip, packed, self.bias, *settings)

        work_per_row = math.prod(weight.shape) * columns
        size = max(math.ceil(_WORK / work_per_row), math.ceil(rows / _BLOCKS))
        run_rows(RowBlocks(block, batch, rows, size))
        return output

    def _weight_for(self, size: tuple[int, int], settings: tuple) -> Tensor:
        """Return the weight packed for inputs of a (height, width); safe to call in several threads."""
        key, packed = state_of(self.weight), self._packed
        if packed is None or packed[0] != key:
            packed = self._packed = (key, {})
        found = packed[1].get(size)
        if found is None:
            found = pack_convolution(self.weight, size, *settings)
            if len(packed[1]) >= _COPIES:
                # Replaced as a whole, since other threads may be reading the dictionary.
                packed = self._packed = (key, {})
            packed[1][size] = found
        return found


def pack_convolutions(module: nn.Module) -> None:
    """Replace every convolution below a module by a packed one with the same parameters."""
    for name, child in list(module.named_children()):
        if PackedConv2d.knows(child):
            setattr(module, name, PackedConv2d(child))
        else:
            pack_convolutions(child)
