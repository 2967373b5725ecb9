"""Multi-scale deformable attention in PyTorch's own operations: the reference that every backend must equal.

It computes equation 3 of Zhu et al. 2021 (written out in ms_deform_attn.py) in three parts: `sampling_geometry` turns
the module's offsets and logits into sampling locations and attention weights, `ms_deform_attn_reference` samples and
sums, and the two `_backward` functions are their gradients, written by hand because autograd does not run inside a
registered operator.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sampling_geometry(
    spatial_shapes: Sequence[int], reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute sampling locations and attention weights, in float32 or finer whatever the model's dtype.

    In half precision, a sample at the far side of a large map would be misplaced by up to one pixel.

    Args:
        spatial_shapes: Height and width of each of the L levels, flat: h0, w0, h1, w1, ...
        reference_points: (B, Q, L, 2) xy points or (B, Q, L, 4) cxcywh boxes, in [0, 1] of each level's padded map.
        sampling_offsets: (B, Q, M, L, K, 2) xy offsets. Around a point, the unit is one cell of the level. Around a
            box, an offset of K is half of the box's width or height.
        attention_logits: (B, Q, M, L, K) logits, normalized over L and K together.

    Returns:
        Sampling locations (B, Q, M, L, K, 2), xy in [0, 1] of each level, and attention weights (B, Q, M, L, K), whose
        sum over L and K is one.
    """
    points = sampling_offsets.shape[-2]
    offsets = sampling_offsets.to(torch.promote_types(sampling_offsets.dtype, torch.float32))
    centers = reference_points[:, :, None, :, None, :2]
    if reference_points.shape[-1] == 2:
        locations = centers + offsets / _level_sizes(spatial_shapes, offsets)
    else:
        locations = centers + offsets / points * reference_points[:, :, None, :, None, 2:] * 0.5
    logits = attention_logits.to(torch.promote_types(attention_logits.dtype, torch.float32))
    return locations, logits.flatten(-2).softmax(-1).view(logits.shape)


def sampling_geometry_backward(
    grad_locations: Tensor,
    grad_weights: Tensor,
    weights: Tensor,
    spatial_shapes: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    reference_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `sampling_geometry`.

    Args:
        grad_locations: (B, Q, M, L, K, 2) gradient of the sampling locations.
        grad_weights: (B, Q, M, L, K) gradient of the attention weights.
        weights: (B, Q, M, L, K) attention weights that `sampling_geometry` returned.
        spatial_shapes: Height and width of each level, flat.
        reference_points: (B, Q, L, 2) points or (B, Q, L, 4) cxcywh boxes.
        sampling_offsets: (B, Q, M, L, K, 2) offsets.
        reference_gradient: Whether the reference points need a gradient.

    Returns:
        Gradients of reference_points (empty if not needed), sampling_offsets and attention_logits, in the dtype of
        the gradients that came in.
    """
    mean = (weights * grad_weights).sum((-2, -1), keepdim=True)
    grad_logits = weights * (grad_weights - mean)
    share = 0.5 / sampling_offsets.shape[-2]
    grad_references = [grad_locations.sum((2, 4))]
    if reference_points.shape[-1] == 2:
        grad_offsets = grad_locations / _level_sizes(spatial_shapes, grad_locations)
    else:
        grad_offsets = grad_locations * reference_points[:, :, None, :, None, 2:] * share
        grad_references.append((grad_locations * sampling_offsets).sum((2, 4)) * share)
    references = torch.cat(grad_references, -1) if reference_gradient else reference_points.new_empty(0)
    return references, grad_offsets, grad_logits


def _level_sizes(spatial_shapes: Sequence[int], like: Tensor) -> Tensor:
    """Width and height of each level in cells, (L, 1, 2), in the dtype and on the device of `like`."""
    sizes = list(zip(spatial_shapes[1::2], spatial_shapes[::2], strict=True))
    if like.device.type == "cpu":
        return torch.tensor(sizes, dtype=like.dtype)[:, None]
    # Copying a list to a GPU synchronizes and cannot be captured in a CUDA graph; filling a tensor avoids both.
    return torch.stack([torch.stack([like.new_full((), side) for side in size]) for size in sizes])[:, None]


def ms_deform_attn_reference(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sample every level with grid_sample and sum with the attention weights; differentiable, any device and dtype.

    Args:
        value: (B, S, M, Dh) values of all levels, one level after the other.
        spatial_shapes: Height and width of each of the L levels, flat: h0, w0, h1, w1, ... Their areas sum to S.
        sampling_locations: (B, Q, M, L, K, 2) xy in [0, 1] of each level; samples outside read zero.
        attention_weights: (B, Q, M, L, K) weights.

    Returns:
        (B, Q, M * Dh) in value's dtype.
    """
    batch_size, _, heads, channels = value.shape
    _, num_queries, _, levels, points, _ = sampling_locations.shape
    # Use the more precise of both dtypes: in a half-precision value's dtype, locations would be rounded.
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    maps = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)
    grids = sampling_locations.to(dtype) * 2 - 1
    samples, start = [], 0
    for level in range(levels):
        height, width = spatial_shapes[2 * level], spatial_shapes[2 * level + 1]
        level_map = maps[..., start : start + height * width].unflatten(-1, (height, width))
        start = start + height * width
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(level_map, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    sampled = torch.stack(samples, dim=-2)
    weights = attention_weights.to(dtype).transpose(1, 2).reshape(batch_size * heads, 1, num_queries, levels, points)
    output = (sampled * weights).sum((-1, -2)).view(batch_size, heads * channels, num_queries)
    return output.transpose(1, 2).contiguous().to(value.dtype)


def ms_deform_attn_reference_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `ms_deform_attn_reference`.

    Args:
        grad_output: (B, Q, M * Dh) gradient of the output.
        value: (B, S, M, Dh) values given to the forward.
        spatial_shapes: Height and width of each level, flat.
        sampling_locations: (B, Q, M, L, K, 2) locations given to the forward.
        attention_weights: (B, Q, M, L, K) weights given to the forward.

    Returns:
        Gradients of value, sampling_locations and attention_weights, each in its own dtype.
    """
    batch_size, _, heads, channels = value.shape
    num_queries, levels = sampling_locations.shape[1], sampling_locations.shape[3]
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    maps = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)
    grids = sampling_locations.to(dtype) * 2 - 1
    weights = attention_weights.to(dtype).transpose(1, 2).flatten(0, 1)[:, None]
    grad = grad_output.to(dtype).transpose(1, 2).reshape(batch_size * heads, channels, num_queries, 1)
    grad_maps, grad_locations, grad_weights, start = [], [], [], 0
    for level in range(levels):
        height, width = spatial_shapes[2 * level], spatial_shapes[2 * level + 1]
        level_map = maps[..., start : start + height * width].unflatten(-1, (height, width))
        start = start + height * width
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(level_map, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        grad_weights.append((grad * sampled).sum(1))
        # 0, 0, False stand for bilinear, zeros outside and unaligned corners, as in the forward.
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


def check_shapes(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> list[int]:
    """Check that the operator's inputs fit together, before a compiled kernel receives pointers to them.

    Args:
        value: (B, S, M, Dh) values.
        spatial_shapes: Height and width of each of the L levels, flat.
        sampling_locations: (B, Q, M, L, K, 2) locations, or offsets for the fused operator.
        attention_weights: (B, Q, M, L, K) weights, or logits for the fused operator.

    Returns:
        spatial_shapes as plain integers.

    Raises:
        ValueError: The shapes do not fit together.
    """
    if value.dim() != 4 or sampling_locations.dim() != 6 or sampling_locations.shape[:-1] != attention_weights.shape:
        raise ValueError(
            f"value {tuple(value.shape)}, locations or offsets {tuple(sampling_locations.shape)} and weights or logits "
            f"{tuple(attention_weights.shape)} do not fit together: give (B, S, M, Dh), (B, Q, M, L, K, 2) and "
            "(B, Q, M, L, K)."
        )
    batch, tokens, heads, _ = value.shape
    rows, queries, columns, levels, _, axes = sampling_locations.shape
    if rows != batch or columns != heads or axes != 2:
        raise ValueError(
            f"The locations or offsets have shape {tuple(sampling_locations.shape)}, but value has {batch} items of "
            f"{heads} heads: give ({batch}, {queries}, {heads}, L, K, 2)."
        )
    sizes = [int(size) for size in spatial_shapes]
    area = sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
    if len(sizes) != 2 * levels or min(sizes) < 0 or area != tokens:
        raise ValueError(
            f"spatial_shapes {sizes} covers {area} tokens, but value has {tokens} on {levels} levels: "
            "give the height and width of each level."
        )
    return sizes


def check_grad_output(grad_output: Tensor, value: Tensor, sampling_locations: Tensor) -> None:
    """Check that an output gradient has the output's shape, (B, Q, M * Dh).

    Raises:
        ValueError: It has another shape.
    """
    batch, _, heads, channels = value.shape
    expected = (batch, sampling_locations.shape[1], heads * channels)
    if tuple(grad_output.shape) != expected:
        raise ValueError(f"grad_output has shape {tuple(grad_output.shape)}: give it the output's shape, {expected}.")
