"""transformers' Swin backbone for torch.export: one graph for every batch and image size.

The stock forward asks in Python whether a side needs padding and cuts maps by views, so an exported graph holds for the
sizes of its example only. Here tokens are rows of one matrix, and windows and merged patches are gathered by indices
computed in the graph (Liu et al. 2021, 3.1 and 3.2). No shape is compared with another, and every side stays of the
form (side - 1) // stride + 1, which the exporter's algebra folds into one division of the image's side.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SwinBackbone

# Parts that other releases of transformers name otherwise.
_BLOCK = ("attention", "layernorm_before", "layernorm_after", "mlp", "shift_size", "window_size")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "relative_position_bias", "num_attention_heads")


def knows(backbone: Any) -> bool:
    """Whether `export_forward` gives what a backbone gives: a SwinBackbone, in evaluation, with parts named as here."""
    if type(backbone) is not SwinBackbone or backbone.training:
        return False
    if backbone.swin.embeddings.position_embeddings is not None:
        return False
    blocks = [block for stage in backbone.swin.encoder.layers for block in stage.blocks]
    return all(hasattr(block, name) for block in blocks for name in _BLOCK) and all(
        hasattr(block.attention, name) for block in blocks for name in _ATTENTION
    )


def export_forward(backbone: Any, pixel_values: Tensor) -> list[Tensor]:
    """What a SwinBackbone gives, without a branch on a size.

    Args:
        backbone: A SwinBackbone that `knows` accepts.
        pixel_values: (B, 3, H, W). In an export H and W must be above 32 (four stages at stride 4), in the example and
            later: the exporter treats a coarsest map one cell wide or high as another graph. Eagerly any size will do.

    Returns:
        The backbone's maps (B, C_l, h_l, w_l), fine to coarse.
    """
    embeddings = backbone.swin.embeddings
    projection = embeddings.patch_embeddings.projection
    down, right = (side - 1 for side in projection.kernel_size)
    # The convolution leaves out the part of this padding that does not fill a patch.
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
    """The normalized map of a stage, if the backbone hands it out: (B * h * w, C) to (B, C, h, w)."""
    name = backbone.stage_names[index]
    if name not in backbone.out_features:
        return None
    return backbone.hidden_states_norms[name](x).view(batch, height, width, -1).permute(0, 3, 1, 2)


def _windows(side: int, window: int) -> int:
    """Windows along a side, the last one padded."""
    return (side - 1) // window + 1


def _window_index(batch: int, height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Row of the token at each place of each window, window by window; batch * height * width where there is none.

    One flat axis instead of broadcast ones: the exporter would tie a window count of 1 in the example to its graph.
    """
    down, across = _windows(height, window), _windows(width, window)
    place = torch.arange(batch * down * across * window * window, device=device)
    cell, cut = place % (window * window), place // (window * window)
    y = (cut // across % down * window + cell // window + shift) % (down * window)
    x = (cut % across * window + cell % window + shift) % (across * window)
    token = (cut // (across * down) * height + y) * width + x
    return torch.where((y < height) & (x < width), token, batch * height * width)


def _token_index(batch: int, height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """The way back: place of each token among the places of `_window_index`."""
    down, across = _windows(height, window), _windows(width, window)
    token = torch.arange(batch * height * width, device=device)
    y = (token // width % height - shift) % (down * window)
    x = (token % width - shift) % (across * window)
    cut = (token // (width * height) * down + y // window) * across + x // window
    return (cut * window + y % window) * window + x % window


def _regions(batch: int, height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Region of each place of shifted windows: the shift joins opposite borders, which must not see each other.

    Only the last window of a side holds two regions, before and after its place window - shift.
    """
    down, across = _windows(height, window), _windows(width, window)
    place = torch.arange(batch * down * across * window * window, device=device)
    cell, cut = place % (window * window), place // (window * window)
    below = (cut // across % down == down - 1) & (cell // window >= window - shift)
    beyond = (cut % across == across - 1) & (cell % window >= window - shift)
    return below.long() * 2 + beyond.long()


def _attend(layer: Any, x: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Window attention with its residual: (B * h * w, C) to the same."""
    attention, window, shift = layer.attention, int(layer.window_size), int(layer.shift_size)
    grid = (batch, height, width, window, shift, x.device)
    area, channels = window * window, x.shape[1]
    count = batch * _windows(height, window) * _windows(width, window)
    heads = (count, area, attention.num_attention_heads, channels // attention.num_attention_heads)
    # Padding is zero after the normalization: one more row stands for all of it.
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
    """Four neighbours side by side to one token: (B * h * w, C) to (B * ceil(h / 2) * ceil(w / 2), 2C)."""
    count = batch * _windows(height, 2) * _windows(width, 2)
    index = _window_index(batch, height, width, 2, 0, x.device)
    # The published order goes down first, then to the right.
    neighbours = F.pad(x, (0, 0, 0, 1)).index_select(0, index).view(count, 2, 2, x.shape[1]).transpose(1, 2)
    return downsample.reduction(downsample.norm(neighbours.reshape(count, 4 * x.shape[1])))
