"""Sine embeddings of image cells, query boxes and text positions within a phrase (Vaswani et al. 2017, 3.5)."""

import math

import torch
from torch import Tensor


def sine_embedding(positions: Tensor, width: int, temperature: float) -> Tensor:
    """Embed positions as sines and cosines of geometrically spaced frequencies, interleaved.

    emb[2i] = sin(p / temperature^(2i / width)), emb[2i + 1] = cos(p / temperature^(2i / width))

    Args:
        positions: (...) float32 positions p.
        width: Number of channels, even.
        temperature: Base of the frequencies, positive.

    Returns:
        (..., width) float32.
    """
    channel = torch.arange(width, dtype=torch.float32, device=positions.device)
    wavelength = temperature ** (2 * torch.div(channel, 2, rounding_mode="floor") / width)
    angles = positions.float()[..., None] / wavelength
    return torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1).flatten(-2)


def image_position_embedding(mask: Tensor, width: int, temperature: float) -> Tensor:
    """Embed the position of every cell of a feature map, relative to the part that is not padding (DETR, A.4).

    Args:
        mask: (B, h, w) bool, True on real cells.
        width: Number of channels, one half for y and one half for x.
        temperature: Base of the frequencies, 20 in Grounding DINO.

    Returns:
        (B, h * w, width) float32, y before x.
    """
    eps, scale = 1e-6, 2 * math.pi
    y = mask.cumsum(1, dtype=torch.float32)
    x = mask.cumsum(2, dtype=torch.float32)
    y = y / (y[:, -1:, :] + eps) * scale
    x = x / (x[:, :, -1:] + eps) * scale
    return sine_embedding(torch.stack((y, x), dim=-1), width // 2, temperature).flatten(3).flatten(1, 2)


def box_position_embedding(boxes: Tensor, width: int, temperature: float) -> Tensor:
    """Embed boxes one coordinate at a time, in the order y, x, w, h (DAB-DETR, Liu et al. 2022).

    Args:
        boxes: (..., 4) cxcywh in [0, 1].
        width: Number of channels of each coordinate.
        temperature: Base of the frequencies, 10000 in Grounding DINO.

    Returns:
        (..., 4 * width) float32.
    """
    x, y, w, h = (boxes.float() * (2 * math.pi)).unbind(-1)
    return sine_embedding(torch.stack((y, x, w, h), dim=-1), width, temperature).flatten(-2)


def token_position_embedding(position_ids: Tensor, width: int, temperature: float) -> Tensor:
    """Embed the position of each text token within its phrase.

    Args:
        position_ids: (B, T) int64, starting at 0 in every phrase.
        width: Number of channels.
        temperature: Base of the frequencies, 10000 in Grounding DINO.

    Returns:
        (B, T, width) float32.
    """
    return sine_embedding(position_ids.float() * (2 * math.pi), width, temperature)
