"""What depends on the sizes of an image's feature maps only: positions, reference points and proposals.

Without padding it is the same for every image of a size, computed once and kept; with padding it follows the masks.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .encoder import grid_reference_points
from .position_encoding import image_position_embedding
from .query_selection import make_proposals

Shapes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ImageGeometry:
    """Geometry of B images, or of 1 that stands for all where nothing is padded.

    Attributes:
        positions: Per level (B, h * w, D) float32.
        valid_ratios: (B, L, 2) float32 share of each level's width and height that is real.
        reference_points: (B, S, L, 2) float32.
        proposals: (B, S, 4) float32 before the sigmoid.
        valid: (B, S) bool, where a proposal stands.
        mask: (B, S) bool, True on real tokens.
    """

    positions: tuple[Tensor, ...]
    valid_ratios: Tensor
    reference_points: Tensor
    proposals: Tensor
    valid: Tensor
    mask: Tensor


def image_geometry(
    shapes: Shapes, masks: Sequence[Tensor] | None, width: int, temperature: float, device: torch.device
) -> ImageGeometry:
    """Geometry of a batch.

    Args:
        shapes: (h, w) of each level.
        masks: (B, h, w) bool of each level, True on real cells; None if all are.
        width: Channels D of the positions.
        temperature: Of their sine embedding.
        device: Where it goes.

    Returns:
        The geometry; do not write to it.
    """
    if masks is not None:
        return _compute(shapes, masks, width, temperature)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _unpadded(shapes, width, temperature, device)
    return _cached(shapes, width, temperature, device)


@functools.lru_cache(maxsize=4)
def _cached(shapes: Shapes, width: int, temperature: float, device: torch.device) -> ImageGeometry:
    # What inference mode makes cannot take part in training later.
    with torch.inference_mode(False), torch.no_grad():
        return _unpadded(shapes, width, temperature, device)


def _unpadded(shapes: Shapes, width: int, temperature: float, device: torch.device) -> ImageGeometry:
    masks = [torch.ones(1, height, width, dtype=torch.bool, device=device) for height, width in shapes]
    return _compute(shapes, masks, width, temperature)


def _compute(shapes: Shapes, masks: Sequence[Tensor], width: int, temperature: float) -> ImageGeometry:
    flat = torch.cat([mask.flatten(1) for mask in masks], dim=1)
    ratios = torch.stack([_valid_ratio(mask) for mask in masks], dim=1)
    proposals, valid = make_proposals(shapes, flat, masks)
    return ImageGeometry(
        positions=tuple(image_position_embedding(mask, width, temperature) for mask in masks),
        valid_ratios=ratios,
        reference_points=grid_reference_points(shapes, ratios),
        proposals=proposals,
        valid=valid,
        mask=flat,
    )


def _valid_ratio(mask: Tensor) -> Tensor:
    """Share of a map's width and height that is real: (B, h, w) bool to (B, 2) float32 xy."""
    width = mask[:, 0, :].sum(1).float() / mask.shape[2]
    height = mask[:, :, 0].sum(1).float() / mask.shape[1]
    return torch.stack((width, height), dim=-1)
