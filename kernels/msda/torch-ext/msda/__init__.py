"""Multi-scale deformable attention (Zhu et al. 2021, arXiv:2010.04159) for CUDA devices and CPUs.

Values may be half precision; locations, weights and sums are float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import layers
from ._ops import add_op_namespace_prefix, ops
from .operator import ms_deform_attn

__all__ = ["backward", "forward", "layers", "ms_deform_attn", "supports"]

_DTYPES = {"cuda": (torch.float32, torch.float16, torch.bfloat16), "cpu": (torch.float32, torch.bfloat16)}
_MAX_LEVELS = {"cuda": 16, "cpu": 256}
_MAX_SAMPLES = {"cuda": 2**20, "cpu": 256}
_MAX_WIDTH = {"cuda": 2**20, "cpu": 256}


def _has_kernel(device_type: str) -> bool:
    # torch has no public way to ask which devices an operator supports; tried with torch 2.13.
    key = {"cuda": "CUDA", "cpu": "CPU"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(add_op_namespace_prefix("forward"), key)


def supports(value: Tensor, sampling_locations: Tensor) -> bool:
    """Return whether `forward` and `backward` accept these inputs; float64 is never accepted.

    Args:
        value: (B, S, M, Dh) values.
        sampling_locations: (B, Q, M, L, K, 2) locations.
    """
    device = value.device.type
    levels, points = sampling_locations.shape[3:5]
    return (
        _has_kernel(device)
        and sampling_locations.device == value.device
        and value.dtype in _DTYPES[device]
        and sampling_locations.dtype != torch.float64
        and value.shape[1] < 2**31
        and 1 <= value.shape[3] <= _MAX_WIDTH[device]
        and 1 <= levels <= _MAX_LEVELS[device]
        and 1 <= levels * points <= _MAX_SAMPLES[device]
    )


def forward(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sample every level bilinearly and sum with the attention weights; `ms_deform_attn` does so with gradients.

    Args:
        value: (B, S, M, Dh) values of all levels, one level after the other.
        spatial_shapes: Height and width of each of the L levels, flat; their areas sum to S.
        sampling_locations: (B, Q, M, L, K, 2) xy in [0, 1] of each level; samples outside read zero.
        attention_weights: (B, Q, M, L, K) weights.

    Returns:
        (B, Q, M * Dh) in value's dtype.
    """
    return ops.forward(value, list(spatial_shapes), sampling_locations.float(), attention_weights.float())


def backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `forward`.

    Args:
        grad_output: (B, Q, M * Dh) gradient of the output.
        value: (B, S, M, Dh) values given to `forward`.
        spatial_shapes: Height and width of each level, flat.
        sampling_locations: (B, Q, M, L, K, 2) locations given to `forward`.
        attention_weights: (B, Q, M, L, K) weights given to `forward`.

    Returns:
        Gradients of value, sampling_locations and attention_weights, each in its own dtype.
    """
    grad_value, grad_locations, grad_weights = ops.backward(
        grad_output.to(value.dtype),
        value,
        list(spatial_shapes),
        sampling_locations.float(),
        attention_weights.float(),
    )
    return grad_value, grad_locations.to(sampling_locations.dtype), grad_weights.to(attention_weights.dtype)
