"""The registered operators gdino_hf::ms_deform_attn and gdino_hf::ms_deform_attn_fused, with their gradients.

The plain operator takes sampling locations and attention weights. The fused one takes what the module's linear layers
produce, offsets and logits: on a GPU with Triton, the softmax and the arithmetic of locations then happen in registers;
elsewhere it is `sampling_geometry` followed by the plain operator.

torch.compile sees each as one node whose output shape is known ("fake" registration). Which backend computes it is
decided at run time by msda_backends.py. torch.export gets the reference's operations instead, which any runtime has.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .msda_backends import backend_for, implementation
from .msda_reference import (
    ms_deform_attn_reference,
    ms_deform_attn_reference_backward,
    sampling_geometry,
    sampling_geometry_backward,
)


def ms_deform_attn(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sum bilinear samples with attention weights, using the fastest backend available.

    Args:
        value: (B, S, M, Dh) values of all levels, one level after the other.
        spatial_shapes: Height and width of each of the L levels, flat: h0, w0, h1, w1, ... Their areas sum to S.
        sampling_locations: (B, Q, M, L, K, 2) xy in [0, 1] of each level; samples outside read zero.
        attention_weights: (B, Q, M, L, K) weights.

    Returns:
        (B, Q, M * Dh) in value's dtype.
    """
    if torch.compiler.is_exporting():
        return ms_deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights)
    return torch.ops.gdino_hf.ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Compute `sampling_geometry` and `ms_deform_attn` as one operator.

    Args:
        value: (B, S, M, Dh) values of all levels, one level after the other.
        spatial_shapes: Height and width of each of the L levels, flat. Their areas sum to S.
        reference_points: (B, Q, L, 2) xy points or (B, Q, L, 4) cxcywh boxes, in [0, 1] of each level's padded map.
        sampling_offsets: (B, Q, M, L, K, 2) offsets, in the units of `sampling_geometry`.
        attention_logits: (B, Q, M, L, K) logits, normalized over L and K together.

    Returns:
        (B, Q, M * Dh) in value's dtype.
    """
    if torch.compiler.is_exporting():
        locations, weights = sampling_geometry(spatial_shapes, reference_points, sampling_offsets, attention_logits)
        return ms_deform_attn_reference(value, spatial_shapes, locations, weights)
    return torch.ops.gdino_hf.ms_deform_attn_fused(
        value, spatial_shapes, reference_points, sampling_offsets, attention_logits
    )


def _forward(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    name = backend_for(value, sampling_locations)
    if name != "torch":
        return implementation(name).forward(value, spatial_shapes, sampling_locations, attention_weights)
    return ms_deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights)


def _backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    name = backend_for(value, sampling_locations)
    if name != "torch":
        return implementation(name).backward(grad_output, value, spatial_shapes, sampling_locations, attention_weights)
    return ms_deform_attn_reference_backward(grad_output, value, spatial_shapes, sampling_locations, attention_weights)


def _fake_forward(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    return value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])


def _fake_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(value), torch.empty_like(sampling_locations), torch.empty_like(attention_weights)


def _autograd(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, sampling_locations, attention_weights = ctx.saved_tensors
    gradients = torch.ops.gdino_hf.ms_deform_attn_backward(
        grad_output.contiguous(), value, ctx.spatial_shapes, sampling_locations, attention_weights
    )
    return gradients[0], None, gradients[1], gradients[2]


def _fused_forward(
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    if backend_for(value, sampling_offsets) == "triton":
        return implementation("triton").forward_fused(
            value, spatial_shapes, reference_points, sampling_offsets, attention_logits
        )
    locations, weights = sampling_geometry(spatial_shapes, reference_points, sampling_offsets, attention_logits)
    return torch.ops.gdino_hf.ms_deform_attn(value, spatial_shapes, locations, weights)


def _fused_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    reference_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    geometry = (spatial_shapes, reference_points, sampling_offsets)
    if backend_for(value, sampling_offsets) == "triton":
        return implementation("triton").backward_fused(
            grad_output, value, *geometry, attention_logits, reference_gradient
        )
    locations, weights = sampling_geometry(*geometry, attention_logits)
    grad_value, grad_locations, grad_weights = torch.ops.gdino_hf.ms_deform_attn_backward(
        grad_output, value, spatial_shapes, locations, weights
    )
    grad_references, grad_offsets, grad_logits = sampling_geometry_backward(
        grad_locations, grad_weights, weights, *geometry, reference_gradient
    )
    return (
        grad_value,
        grad_references.to(reference_points.dtype),
        grad_offsets.to(sampling_offsets.dtype),
        grad_logits.to(attention_logits.dtype),
    )


def _fake_fused_forward(
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    return _fake_forward(value, spatial_shapes, sampling_offsets, attention_logits)


def _fake_fused_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    reference_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_references = torch.empty_like(reference_points) if reference_gradient else reference_points.new_empty(0)
    return (
        torch.empty_like(value),
        grad_references,
        torch.empty_like(sampling_offsets),
        torch.empty_like(attention_logits),
    )


def _fused_autograd(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, *rest = ctx.saved_tensors
    reference_gradient = ctx.needs_input_grad[2]
    gradients = torch.ops.gdino_hf.ms_deform_attn_fused_backward(
        grad_output.contiguous(), value, ctx.spatial_shapes, *rest, reference_gradient
    )
    return gradients[0], None, gradients[1] if reference_gradient else None, gradients[2], gradients[3]


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    value, spatial_shapes, *rest = inputs
    ctx.spatial_shapes = spatial_shapes
    ctx.save_for_backward(value, *rest)


_PLAIN = "Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights"
_FUSED = (
    "Tensor value, SymInt[] spatial_shapes, Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits"
)


def _register() -> None:
    """Define the operators once per process, since an installed gdino_hf and its Hub copy may both be loaded."""
    if hasattr(torch.ops.gdino_hf, "ms_deform_attn"):
        return
    _define("ms_deform_attn", f"({_PLAIN}) -> Tensor", _forward, _fake_forward, _autograd)
    _define(
        "ms_deform_attn_backward",
        f"(Tensor grad_output, {_PLAIN}) -> (Tensor, Tensor, Tensor)",
        _backward,
        _fake_backward,
    )
    _define("ms_deform_attn_fused", f"({_FUSED}) -> Tensor", _fused_forward, _fake_fused_forward, _fused_autograd)
    _define(
        "ms_deform_attn_fused_backward",
        f"(Tensor grad_output, {_FUSED}, bool reference_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
        _fused_backward,
        _fake_fused_backward,
    )


def _define(name: str, schema: str, compute: Any, fake: Any, autograd: Any = None) -> None:
    operator = torch.library.custom_op(f"gdino_hf::{name}", compute, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    if autograd is not None:
        operator.register_autograd(autograd, setup_context=_setup_context)


_register()
