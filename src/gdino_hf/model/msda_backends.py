"""The operator gdino_hf::ms_deform_attn, and which implementation of it runs.

The choice is made inside the operator, when it runs, so graphs that contain it hold on any machine. GDINO_MSDA forces
one of "c" (CPU library of an installed gdino_hf) or "torch" (the reference); "auto" takes the fastest that loads.
"""

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .msda_c import load as load_c_library

logger = logging.getLogger(__name__)

_VARIABLE = "GDINO_MSDA"
_BACKENDS = ("auto", "c", "triton", "hub", "torch")


def ms_deform_attn_reference(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The equation by grid_sample, differentiable, on any device and in any dtype.

    Args:
        value: (B, S, M, Dh).
        spatial_shapes: h0, w0, h1, w1, ... of the L levels; their products sum to S.
        sampling_locations: (B, Q, M, L, K, 2) xy in [0, 1] of each level; samples outside read zero.
        attention_weights: (B, Q, M, L, K).

    Returns:
        (B, Q, M * Dh) in the value's dtype.
    """
    batch_size, _, heads, width = value.shape
    _, num_queries, _, levels, points, _ = sampling_locations.shape
    shapes = [(spatial_shapes[2 * i], spatial_shapes[2 * i + 1]) for i in range(levels)]
    # Sampling in the value's dtype would round the locations; in theirs nothing is lost.
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    maps = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)
    grids = sampling_locations.to(dtype) * 2 - 1
    samples, start = [], 0
    for level, (height, width_) in enumerate(shapes):
        level_map = maps[..., start : start + height * width_].unflatten(-1, (height, width_))
        start = start + height * width_
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(level_map, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    sampled = torch.stack(samples, dim=-2)
    weights = attention_weights.to(dtype).transpose(1, 2).reshape(batch_size * heads, 1, num_queries, levels, points)
    output = (sampled * weights).sum((-1, -2)).view(batch_size, heads * width, num_queries)
    return output.transpose(1, 2).contiguous().to(value.dtype)


def ms_deform_attn_reference_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the reference, written out: autograd does not work inside an operator.

    Args:
        grad_output: (B, Q, M * Dh).
        value, spatial_shapes, sampling_locations, attention_weights: As in `ms_deform_attn_reference`.

    Returns:
        Gradients of value, sampling_locations and attention_weights, each in its own dtype.
    """
    batch_size, _, heads, width = value.shape
    num_queries, levels = sampling_locations.shape[1], sampling_locations.shape[3]
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    maps = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)
    grids = sampling_locations.to(dtype) * 2 - 1
    weights = attention_weights.to(dtype).transpose(1, 2).flatten(0, 1)[:, None]
    grad = grad_output.to(dtype).transpose(1, 2).reshape(batch_size * heads, width, num_queries, 1)
    grad_maps, grad_locations, grad_weights, start = [], [], [], 0
    for level in range(levels):
        height, width_ = spatial_shapes[2 * level], spatial_shapes[2 * level + 1]
        level_map = maps[..., start : start + height * width_].unflatten(-1, (height, width_))
        start = start + height * width_
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(level_map, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        grad_weights.append((grad * sampled).sum(1))
        # 0, 0, False: bilinear, zeros outside, corners not aligned, as above.
        grad_map, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            (grad * weights[..., level, :]).contiguous(),
            level_map.contiguous(),
            grid.contiguous(),
            0,
            0,
            False,
            [True, True],
        )
        grad_maps.append(grad_map.flatten(2))
        grad_locations.append(2 * grad_grid)

    def by_query(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch_size, heads)).transpose(1, 2).contiguous()

    grad_value = torch.cat(grad_maps, dim=-1).unflatten(0, (batch_size, heads)).permute(0, 3, 1, 2).contiguous()
    return (
        grad_value.to(value.dtype),
        by_query(torch.stack(grad_locations, dim=2)).to(sampling_locations.dtype),
        by_query(torch.stack(grad_weights, dim=2)).to(attention_weights.dtype),
    )


@functools.cache
def _c_library() -> Any:
    return load_c_library()


def requested_backend() -> str:
    """The backend GDINO_MSDA asks for, "auto" if unset.

    Raises:
        ValueError: it names none.
    """
    name = os.environ.get(_VARIABLE, "auto").lower()
    if name not in _BACKENDS:
        raise ValueError(f"{_VARIABLE}={name!r} names no backend; choose one of {', '.join(_BACKENDS)}.")
    return name


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)


def backend_for(value: Tensor, sampling_locations: Tensor) -> str:
    """Name of the implementation that runs for these inputs, "c" or "torch"."""
    requested = requested_backend()
    if requested in ("auto", "c") and value.device.type == "cpu":
        library = _c_library()
        if library is not None and library.supports(value, sampling_locations):
            return "c"
    if requested not in ("auto", "torch", "c"):
        _log_once(f"{_VARIABLE}={requested}, but that backend is not part of this version: the torch reference runs.")
    return "torch"


def _forward(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    if backend_for(value, sampling_locations) == "c":
        return _c_library().forward(value, spatial_shapes, sampling_locations, attention_weights)
    return ms_deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights)


def _backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend_for(value, sampling_locations) == "c":
        return _c_library().backward(grad_output, value, spatial_shapes, sampling_locations, attention_weights)
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


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    value, spatial_shapes, sampling_locations, attention_weights = inputs
    ctx.spatial_shapes = spatial_shapes
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _autograd(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, sampling_locations, attention_weights = ctx.saved_tensors
    gradients = torch.ops.gdino_hf.ms_deform_attn_backward(
        grad_output.contiguous(), value, ctx.spatial_shapes, sampling_locations, attention_weights
    )
    return gradients[0], None, gradients[1], gradients[2]


def _register() -> None:
    """Define the operator once per process: an installed gdino_hf and its Hub copy may both be loaded."""
    if hasattr(torch.ops.gdino_hf, "ms_deform_attn"):
        return
    arguments = "Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights"
    forward = torch.library.custom_op(
        "gdino_hf::ms_deform_attn", _forward, mutates_args=(), schema=f"({arguments}) -> Tensor"
    )
    backward = torch.library.custom_op(
        "gdino_hf::ms_deform_attn_backward",
        _backward,
        mutates_args=(),
        schema=f"(Tensor grad_output, {arguments}) -> (Tensor, Tensor, Tensor)",
    )
    forward.register_fake(_fake_forward)
    backward.register_fake(_fake_backward)
    forward.register_autograd(_autograd, setup_context=_setup_context)


_register()


def ms_deform_attn(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples by the fastest backend at hand; see `ms_deform_attn_reference` for shapes."""
    return torch.ops.gdino_hf.ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights)
