"""transformers' Swin backbone for torch.export: one graph for every batch and image size.

The stock forward decides in Python whether a side needs padding and splits maps by views, so a graph exported from it
is valid for the example's sizes only. Here tokens are the rows of one matrix, and windows and merged patches are
gathered by indices computed inside the graph (Liu et al. 2021, sections 3.1 and 3.2). Shapes are never compared with
each other, and every side keeps the form (side - 1) // stride + 1, which the exporter simplifies to one division of the
image's side.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .transformers_internals import has_known_swin_parts


def knows(backbone: Any) -> bool:
    """Return whether `export_forward` can stand in for this backbone's own forward.

    It can for a SwinBackbone in evaluation mode, without absolute position embeddings, from a supported transformers.
    """
    if not has_known_swin_parts(backbone) or backbone.training:
        return False
    return backbone.swin.embeddings.position_embeddings is None


def export_forward(backbone: Any, pixel_values: Tensor) -> list[Tensor]:
    """Compute a SwinBackbone's feature maps without branching on a size.

    Args:
        backbone: A SwinBackbone for which `knows` returns True.
        pixel_values: (B, 3, H, W) normalized pixels. For an export, H and W must be above 32 in the example and in all
            later inputs: with four stages, a smaller side leaves the coarsest map one cell wide, which the exporter
            treats as another graph. Eager calls accept any size.

    Returns:
        Feature maps (B, C_l, h_l, w_l), fine to coarse.
    """
    embeddings = backbone.swin.embeddings
    projection = embeddings.patch_embeddings.projection
    down, right = (side - 1 for side in projection.kernel_size)
    # The convolution drops whatever part of this padding does not fill a patch.
    patches = projection(F.pad(pixel_values, (0, right, 0, down)))
    batch, _, height, width = patches.shape
    x = embeddings.norm(patches.flatten(2).transpose(1, 2).flatten(0, 1))
    states = [_to_map(backbone, 0, x, batch, height, width)]
    for index, stage in enumerate(backbone.swin.encoder.layers, start=1):
        for layer in stage.blocks:
            x = _attend(layer, x, batch, height, width)
            x = x + layer.mlp(layer.layernorm_after(x))
        states.append(_to_map(backbone, index, x, batch, height, width))
        if stage.downsample is not None:
            x = _merge(stage.downsample, x, batch, height, width)
            height, width = _windows(height, 2), _windows(width, 2)
    return [state for state in states if state is not None]


def _to_map(backbone: Any, index: int, x: Tensor, batch: int, height: int, width: int) -> Tensor | None:
    """Normalize a stage's tokens and reshape (B * h * w, C) to (B, C, h, w); None if the stage is not an output."""
    name = backbone.stage_names[index]
    if name not in backbone.out_features:
        return None
    return backbone.hidden_states_norms[name](x).view(batch, height, width, -1).permute(0, 3, 1, 2)


def _windows(side: int, window: int) -> int:
    """Number of windows along a side; the last one may be padded."""
    return (side - 1) // window + 1


def _divide(index: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Return quotient and remainder of integers that are not negative, without `%`.

    The ONNX exporter fails on the remainder of a tensor by a dynamic size.
    """
    quotient = index // divisor
    return quotient, index - quotient * divisor


def _places(
    batch: int, down: int, across: int, window: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Image, row and column of the window, and row and column within the window, of each position of each window.

    The index has one flat axis: with broadcast axes, a window count of 1 in the example would become a constant of the
    exported graph.
    """
    cut, cell = _divide(torch.arange(batch * down * across * window * window, device=device), window * window)
    cut, column = _divide(cut, across)
    image, row = _divide(cut, down)
    return image, row, column, *_divide(cell, window)


def _window_index(batch: int, height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Index of the token at each position of each window; batch * height * width stands for padding."""
    down, across = _windows(height, window), _windows(width, window)
    image, row, column, below, right = _places(batch, down, across, window, device)
    _, y = _divide(row * window + below + shift, down * window)
    _, x = _divide(column * window + right + shift, across * window)
    token = (image * height + y) * width + x
    return torch.where((y < height) & (x < width), token, batch * height * width)


def _token_index(batch: int, height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Inverse of `_window_index`: the position of each token among all windows."""
    down, across = _windows(height, window), _windows(width, window)
    line, x = _divide(torch.arange(batch * height * width, device=device), width)
    image, y = _divide(line, height)
    # Whole maps are added, so that what is divided is not negative.
    row, below = _divide(_divide(y + down * window - shift, down * window)[1], window)
    column, right = _divide(_divide(x + across * window - shift, across * window)[1], window)
    return (((image * down + row) * across + column) * window + below) * window + right


def _regions(batch: int, height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Region index of each position of shifted windows; positions attend to their own region only.

    The cyclic shift joins opposite borders of the map in the last window of each side. That window has two regions,
    which meet at place window - shift.
    """
    down, across = _windows(height, window), _windows(width, window)
    _, row, column, y, x = _places(batch, down, across, window, device)
    below = (row == down - 1) & (y >= window - shift)
    beyond = (column == across - 1) & (x >= window - shift)
    return below.long() * 2 + beyond.long()


def _attend(layer: Any, x: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Apply window attention and add the residual, (B * h * w, C) to the same shape."""
    attention, window, shift = layer.attention, int(layer.window_size), int(layer.shift_size)
    grid = (batch, height, width, window, shift, x.device)
    area, channels = window * window, x.shape[1]
    count = batch * _windows(height, window) * _windows(width, window)
    heads = (count, area, attention.num_attention_heads, channels // attention.num_attention_heads)
    # Padding is zero after normalization, so one extra zero row stands for every padded position.
    rows = F.pad(layer.layernorm_before(x), (0, 0, 0, 1)).index_select(0, _window_index(*grid))
    query, key, value = (
        linear(rows).view(heads).transpose(1, 2) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    bias = attention.relative_position_bias()
    if shift > 0:
        regions = _regions(*grid).view(count, 1, area)
        apart = regions[..., None] != regions[:, :, None]
        bias = bias - 100.0 * apart.to(bias.dtype)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    attended = attention.o_proj(attended.transpose(1, 2).reshape(count * area, channels))
    return x + attended.index_select(0, _token_index(*grid))


def _merge(downsample: Any, x: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Merge 2 x 2 neighbours into one token, (B * h * w, C) to (B * ceil(h / 2) * ceil(w / 2), 2C)."""
    count = batch * _windows(height, 2) * _windows(width, 2)
    index = _window_index(batch, height, width, 2, 0, x.device)
    # The published weights expect the four neighbours in column-major order.
    neighbours = F.pad(x, (0, 0, 0, 1)).index_select(0, index).view(count, 2, 2, x.shape[1]).transpose(1, 2)
    return downsample.reduction(downsample.norm(neighbours.reshape(count, 4 * x.shape[1])))
