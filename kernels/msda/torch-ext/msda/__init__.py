"""Multi-scale deformable attention (Zhu et al. 2021, arXiv:2010.04159) for CUDA devices and CPUs.

Values may be half precision; sampling locations, attention weights and sums are float32.
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
    key = {"cuda": "CUDA", "cpu": "CPU"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(add_op_namespace_prefix("forward"), key)


def supports(value: Tensor, sampling_locations: Tensor) -> bool:
    """Whether `forward` and `backward` take these; float64 they never do.

    Args:
        value: (B, S, M, Dh).
        sampling_locations: (B, Q, M, L, K, 2).
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
    """Sample every level bilinearly and sum with the attention weights; no gradient, see `ms_deform_attn`.

    Args:
        value: (B, S, M, Dh), the levels' tokens one after the other.
        spatial_shapes: h0, w0, h1, w1, ... of the L levels; their areas sum to S.
        sampling_locations: (B, Q, M, L, K, 2) x, y in 0..1 of the level; outside is zero.
        attention_weights: (B, Q, M, L, K).

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
    """Gradients of `forward`: of value, locations and weights, each in the dtype of what it belongs to."""
    grad_value, grad_locations, grad_weights = ops.backward(
        grad_output.to(value.dtype),
        value,
        list(spatial_shapes),
        sampling_locations.float(),
        attention_weights.float(),
    )
    return grad_value, grad_locations.to(sampling_locations.dtype), grad_weights.to(attention_weights.dtype)
