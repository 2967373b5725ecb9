"""Shape functions and gradients of the operator, for autograd, torch.compile and CUDA graphs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops


@torch.library.register_fake(add_op_namespace_prefix("forward"))
def _fake_forward(value, spatial_shapes, sampling_locations, attention_weights):
    return value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.register_fake(add_op_namespace_prefix("backward"))
def _fake_backward(grad_output, value, spatial_shapes, sampling_locations, attention_weights):
    contiguous = torch.contiguous_format
    return tuple(torch.empty_like(x, memory_format=contiguous) for x in (value, sampling_locations, attention_weights))


def _setup_context(ctx, inputs, output):
    value, ctx.spatial_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _backward(ctx, grad_output):
    value, *rest = ctx.saved_tensors
    gradients = ops.backward(grad_output, value, ctx.spatial_shapes, *rest)
    return gradients[0], None, gradients[1], gradients[2]


torch.library.register_autograd(add_op_namespace_prefix("forward"), _backward, setup_context=_setup_context)


def ms_deform_attn(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sum bilinear samples with attention weights, with gradients; the arguments are those of `forward`."""
    return ops.forward(value, list(spatial_shapes), sampling_locations.float(), attention_weights.float())
