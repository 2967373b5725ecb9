"""Convolutions in float32 for CPUs with AVX2 or AVX-512, through the C library of float_linear.py.

The pixels that a few output pixels see are copied to the cache and multiplied there, so nothing is padded, cut into
strips or converted, and a leaky ReLU is computed with the convolution.
"""

import math
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from ..model.csp_pan import ConvLeakyReLU
from .float_linear import FloatWeight, load
from .packed_convolution import PackedConv2d
from .packed_linear import runs_packed, share_state, state_of
from .workers import RowBlocks, run_rows

_WORK = 4e6
"""Multiplications that a block has at least: fewer take less time than handing the block to a thread."""


class FloatConv2d(PackedConv2d):
    """A convolution that shares another one's parameters and runs in the C library where possible.

    Args:
        convolution: The layer to replace; its parameters are shared.
        slope: Slope of a leaky ReLU that follows the layer and is computed with it; None for no activation.
    """

    def __init__(self, convolution: nn.Conv2d, slope: float | None = None) -> None:
        super().__init__(convolution)
        self.slope = slope
        self._weight: tuple[tuple, FloatWeight] | None = None

    @staticmethod
    def computes(module: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Return whether the library computes a convolution: square, ungrouped, with zero padding, not dilated."""
        return (
            PackedConv2d.knows(module)
            and module.groups == 1
            and all(
                len(set(pair)) == 1
                for pair in (module.kernel_size, module.stride, cast("tuple[int, int]", module.padding))
            )
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_weight": None}

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, N, H', W')."""
        weight = self._packed_weight(x)
        if weight is None:
            x = super().forward(x)
            return x if self.slope is None else nn.functional.leaky_relu(x, self.slope)
        batch, _, *sides = x.shape
        (side, _), (step, _), (padding, _) = self.kernel_size, self.stride, cast("tuple[int, int]", self.padding)
        rows, columns = ((n + 2 * padding - side) // step + 1 for n in sides)
        pixels = x.permute(0, 2, 3, 1).contiguous()
        output = pixels.new_empty(batch, rows, columns, self.out_channels)

        def block(image: int, part: slice) -> None:
            weight.library.convolution(
                pixels[image],
                weight,
                output[image],
                side=side,
                step=step,
                padding=padding,
                rows=part,
                slope=self.slope,
            )

        run_rows(RowBlocks(block, batch, rows, math.ceil(_WORK / (math.prod(self.weight.shape) * columns))))
        return output.permute(0, 3, 1, 2)

    def _packed_weight(self, x: Tensor) -> FloatWeight | None:
        """Return the weight in the library's layout if the layer can run on x there, else None."""
        if x.dtype != torch.float32 or x.ndim != 4 or not runs_packed(x, self.weight):
            return None
        padding = cast("tuple[int, int]", self.padding)[0]
        library = load()
        if library is None or x.shape[1] != self.in_channels or min(x.shape[2:]) + 2 * padding < self.kernel_size[0]:
            return None
        key = state_of(self.weight, *([] if self.bias is None else [self.bias]))
        if self._weight is None or self._weight[0] != key:
            with torch.inference_mode(False):
                rows = self.weight.detach().permute(0, 2, 3, 1).flatten(1)
                self._weight = (key, FloatWeight(library, rows, self.bias))
        return self._weight[1]


def pack_float_convolutions(module: nn.Module) -> None:
    """Replace every convolution below a module that the C library computes, together with its leaky ReLU."""
    for name, child in list(module.named_children()):
        if type(child) is ConvLeakyReLU and FloatConv2d.computes(child.conv):
            setattr(module, name, FloatConvLeakyReLU(child))
        elif FloatConv2d.computes(child):
            setattr(module, name, FloatConv2d(child))
        else:
            pack_float_convolutions(child)


class FloatConvLeakyReLU(ConvLeakyReLU):
    """A ConvLeakyReLU that shares another one's parameters and runs in the C library where possible.

    Args:
        layer: The layer to replace; its parameters are shared.
    """

    def __init__(self, layer: ConvLeakyReLU) -> None:
        nn.Module.__init__(self)
        share_state(self, layer)
        self.conv = FloatConv2d(layer.conv, layer.negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, N, H', W')."""
        return self.conv(x)
