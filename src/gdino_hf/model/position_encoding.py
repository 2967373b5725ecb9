"""Sine embeddings of image grids, of query boxes and of phrase-local token positions (Vaswani et al. 2017, 3.5)."""

import math

import torch
from torch import Tensor


def sine_embedding(positions: Tensor, width: int, temperature: float) -> Tensor:
    """Interleaved sine and cosine of each position at geometrically spaced frequencies.

    emb[2i] = sin(p / temperature^(2i / width)), emb[2i + 1] = cos(the same).

    Args:
        positions: (...) float32, in radians at the highest frequency.
        width: Even number of channels.
        temperature: Base of the frequencies, positive.

    Returns:
        (..., width) float32.
    """
    channel = torch.arange(width, dtype=torch.float32, device=positions.device)
    wavelength = temperature ** (2 * torch.div(channel, 2, rounding_mode="floor") / width)
    angles = positions.float()[..., None] / wavelength
    return torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1).flatten(-2)


def image_position_embedding(mask: Tensor, width: int, temperature: float) -> Tensor:
    """Position of every cell of a feature map within the real part of its image (Carion et al. 2020, A.4).

    Args:
        mask: (B, h, w) bool, True on real cells.
        width: Channels, half for y and half for x.
        temperature: 20 in Grounding DINO.

    Returns:
        (B, h * w, width) float32, y before x.
    """
    eps, scale = 1e-6, 2 * math.pi
    y = mask.cumsum(1, dtype=torch.float32)
    x = mask.cumsum(2, dtype=torch.float32)
    y = y / (y[:, -1:, :] + eps) * scale
    x = x / (x[:, :, -1:] + eps) * scale
    embeddings = [sine_embedding(axis, width // 2, temperature) for axis in (y, x)]
    return torch.cat(embeddings, dim=-1).flatten(1, 2)


def box_position_embedding(boxes: Tensor, width: int, temperature: float) -> Tensor:
    """Sine embedding of boxes, coordinate by coordinate in the order y, x, w, h (Liu et al. 2022, DAB-DETR).

    Args:
        boxes: (..., 4) cxcywh in [0, 1].
        width: Channels per coordinate.
        temperature: 10000 in Grounding DINO.

    Returns:
        (..., 4 * width) float32.
    """
    x, y, w, h = (boxes.float() * (2 * math.pi)).unbind(-1)
    return torch.cat([sine_embedding(coordinate, width, temperature) for coordinate in (y, x, w, h)], dim=-1)


def token_position_embedding(position_ids: Tensor, width: int, temperature: float) -> Tensor:
    """Sine embedding of phrase-local token positions.

    Args:
        position_ids: (B, T) int64, restarting at 0 in every phrase.
        width: Channels.
        temperature: 10000 in Grounding DINO.

    Returns:
        (B, T, width) float32.
    """
    return sine_embedding(position_ids.float() * (2 * math.pi), width, temperature)


def grid_centers(height: int, width: int, device: torch.device) -> Tensor:
    """Centers of a map's cells in cells, row by row: (h * w, 2) float32 xy."""
    y = torch.arange(height, dtype=torch.float32, device=device) + 0.5
    x = torch.arange(width, dtype=torch.float32, device=device) + 0.5
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((grid_x, grid_y), dim=-1).flatten(0, 1)
