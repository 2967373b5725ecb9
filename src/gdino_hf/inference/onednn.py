"""Layers through oneDNN with prepacked weights: the one file that calls torch's private mkldnn operators.

`torch.ops.mkldnn._reorder_linear_weight`, `_linear_pointwise` and their counterparts for convolutions are what torch's
own compiler emits for CPUs. They have no stability promise; they were tried with torch 2.13. Builds without oneDNN lack
them, and a later release may rename them or change their arguments. `can_pack` therefore computes a small example and
compares it with the known answer. If that fails, it returns False, `optimize_for_inference` logs one line, and ordinary
linear layers run.
"""

import functools

import torch
from torch import Tensor


def pack(weight: Tensor) -> Tensor:
    """Convert an (N, C) weight to oneDNN's layout for this CPU; other operations cannot read the result."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """Compute activation(x W^T + b).

    Args:
        x: (..., C) input in the weight's dtype.
        packed: Weight that `pack` returned.
        bias: (N,) bias, or None.
        activation: "none", "relu" or "gelu".

    Returns:
        (..., N) output.
    """
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "none" if activation == "gelu" else "")


def pack_convolution(
    weight: Tensor, size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], groups: int
) -> Tensor:
    """Convert an (N, C / groups, kh, kw) weight to oneDNN's layout for this CPU and inputs of a (height, width).

    On a CPU without AVX-512 the layout depends on the input's size. Inputs of another size are computed correctly, but
    their weight is converted in every call, which can take a hundred times as long as the convolution.
    """
    weight = weight.detach().contiguous(memory_format=torch.channels_last)
    shape = [1, weight.shape[1] * groups, *size]
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, (1, 1), groups, shape)


def packed_convolution(
    x: Tensor, packed: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int], groups: int
) -> Tensor:
    """Convolve (B, C, H, W) with a weight that `pack_convolution` returned for the same stride, padding and groups."""
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, padding, stride, (1, 1), groups, "none", [], "")


@functools.cache
def can_pack_convolutions(dtype: torch.dtype) -> bool:
    """Return whether this build of torch packs convolutions of a dtype and computes them correctly."""
    if not can_pack(dtype):
        return False
    try:
        weight = torch.arange(18, dtype=dtype, device="cpu").view(1, 2, 3, 3)
        settings = (2, 2), (0, 1), 1
        found = packed_convolution(
            torch.ones_like(weight), pack_convolution(weight, (3, 3), *settings), weight.new_ones(1), *settings
        )
        return found.float().flatten().tolist() == [109.0, 97.0]
    except (AttributeError, RuntimeError, TypeError):
        return False


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Return whether this build of torch packs weights of a dtype and multiplies correctly with them."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        # Whole numbers below 256 are exact in both dtypes.
        weight = torch.arange(6, dtype=dtype, device="cpu").view(2, 3)
        found = packed_linear(weight.new_ones(4, 3), pack(weight), weight.new_ones(2), "relu")
        return torch.equal(found.float(), found.new_tensor([[4.0, 13.0]], dtype=torch.float32).expand(4, 2))
    except (AttributeError, RuntimeError, TypeError):
        return False
