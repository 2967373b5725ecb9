"""The operator gdino_hf::ms_deform_attn_fused: deformable attention from what the linear layers give.

It takes sampling offsets and logits instead of locations and weights. On a GPU with Triton the softmax and the
arithmetic of locations then happen in registers; elsewhere they are PyTorch's operations around the plain operator.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .msda_backends import backend_for, candidates, implementation


def sampling_geometry(
    spatial_shapes: Sequence[int], reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the samples lie and what they weigh, in float32 or finer whatever the model's dtype.

    Half precision places a sample up to a pixel off at the far side of a large map.

    Args:
        spatial_shapes: h0, w0, h1, w1, ... of the L levels.
        reference_points: (B, Q, L, 2) points or (B, Q, L, 4) cxcywh boxes, in units of each level's padded map.
        sampling_offsets: (B, Q, M, L, K, 2). Of a point: in cells of the level. Of a box: in half sides, shared out
            among the points.
        attention_logits: (B, Q, M, L, K).

    Returns:
        Locations (B, Q, M, L, K, 2) and weights (B, Q, M, L, K) that sum to one over L and K.
    """
    points = sampling_offsets.shape[-2]
    offsets = sampling_offsets.to(torch.promote_types(sampling_offsets.dtype, torch.float32))
    centers = reference_points[:, :, None, :, None, :2]
    if reference_points.shape[-1] == 2:
        locations = centers + offsets / _cells(spatial_shapes, offsets)
    else:
        locations = centers + offsets / points * reference_points[:, :, None, :, None, 2:] * 0.5
    logits = attention_logits.to(torch.promote_types(attention_logits.dtype, torch.float32))
    return locations, logits.flatten(-2).softmax(-1).view(logits.shape)


def _cells(spatial_shapes: Sequence[int], like: Tensor) -> Tensor:
    """(L, 1, 2) width and height of each level."""
    sizes = list(zip(spatial_shapes[1::2], spatial_shapes[::2], strict=True))
    if like.device.type == "cpu":
        return torch.tensor(sizes, dtype=like.dtype)[:, None]
    # A list copied to a GPU makes the host wait, and cannot be part of a CUDA graph; filling does neither.
    return torch.stack([torch.stack([like.new_full((), side) for side in size]) for size in sizes])[:, None]


def _forward(
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


def _backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    reference_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend_for(value, sampling_offsets) == "triton":
        return implementation("triton").backward_fused(
            grad_output,
            value,
            spatial_shapes,
            reference_points,
            sampling_offsets,
            attention_logits,
            reference_gradient,
        )
    locations, weights = sampling_geometry(spatial_shapes, reference_points, sampling_offsets, attention_logits)
    grad_value, grad_locations, grad_weights = torch.ops.gdino_hf.ms_deform_attn_backward(
        grad_output, value, spatial_shapes, locations, weights
    )
    mean = (weights * grad_weights).sum((-2, -1), keepdim=True)
    grad_logits = weights * (grad_weights - mean)
    share = 0.5 / sampling_offsets.shape[-2]
    grad_references = [grad_locations.sum((2, 4))]
    if reference_points.shape[-1] == 2:
        grad_offsets = grad_locations / _cells(spatial_shapes, grad_locations)
    else:
        grad_offsets = grad_locations * reference_points[:, :, None, :, None, 2:] * share
        grad_references.append((grad_locations * sampling_offsets).sum((2, 4)) * share)
    return (
        grad_value,
        torch.cat(grad_references, -1).to(reference_points.dtype)
        if reference_gradient
        else reference_points.new_empty(0),
        grad_offsets.to(sampling_offsets.dtype),
        grad_logits.to(attention_logits.dtype),
    )


def _fake_forward(
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    return value.new_empty(value.shape[0], sampling_offsets.shape[1], value.shape[2] * value.shape[3])


def _fake_backward(
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


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    value, spatial_shapes, *rest = inputs
    ctx.spatial_shapes = spatial_shapes
    ctx.save_for_backward(value, *rest)


def _autograd(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, *rest = ctx.saved_tensors
    wanted = ctx.needs_input_grad[2]
    gradients = torch.ops.gdino_hf.ms_deform_attn_fused_backward(
        grad_output.contiguous(), value, ctx.spatial_shapes, *rest, wanted
    )
    return gradients[0], None, gradients[1] if wanted else None, gradients[2], gradients[3]


def _register() -> None:
    """Define the operator once per process: an installed gdino_hf and its Hub copy may both be loaded."""
    if hasattr(torch.ops.gdino_hf, "ms_deform_attn_fused"):
        return
    arguments = (
        "Tensor value, SymInt[] spatial_shapes, Tensor reference_points, Tensor sampling_offsets, "
        "Tensor attention_logits"
    )
    forward = torch.library.custom_op(
        "gdino_hf::ms_deform_attn_fused", _forward, mutates_args=(), schema=f"({arguments}) -> Tensor"
    )
    backward = torch.library.custom_op(
        "gdino_hf::ms_deform_attn_fused_backward",
        _backward,
        mutates_args=(),
        schema=f"(Tensor grad_output, {arguments}, bool reference_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    )
    forward.register_fake(_fake_forward)
    backward.register_fake(_fake_backward)
    forward.register_autograd(_autograd, setup_context=_setup_context)


_register()


@torch.compiler.assume_constant_result
def prefers_fused(device_type: str) -> bool:
    """Whether the backend of a device computes locations and weights itself: `ms_deform_attn_fused` is then faster."""
    return next((name for name in candidates(device_type) if implementation(name) is not None), "torch") == "triton"


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Deformable attention of value (B, S, M, Dh); see `sampling_geometry` for the rest. Returns (B, Q, M * Dh)."""
    return torch.ops.gdino_hf.ms_deform_attn_fused(
        value, spatial_shapes, reference_points, sampling_offsets, attention_logits
    )
