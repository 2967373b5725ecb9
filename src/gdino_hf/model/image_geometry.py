"""Positions, reference points and proposals: everything that depends only on the sizes of the feature maps.

Without padding these are equal for all images of one size, so they are computed once and cached. With padding they
follow the masks.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .position_encoding import image_position_embedding

Shapes = tuple[tuple[int, int], ...]

# Proposals whose centre is nearer to the border than this, or whose sides are nearer to 0 or 1, are left out: their
# inverse sigmoid is too large to learn from.
_MARGIN = 0.01
# The outermost of 50 cells lie on the margin, where rounding would decide. A runtime that multiplies by 1 / 50 rounds
# otherwise than one that divides.
_ON_MARGIN = 1e-6
_BASE_SIZE = 0.05


@dataclass(frozen=True)
class ImageGeometry:
    """Geometry of B images, or of one image that stands for all if nothing is padded.

    Attributes:
        positions: Sine embedding of the cells of each level, (B, h * w, D) float32.
        valid_ratios: (B, L, 2) float32, the share of each level's width and height that is not padding.
        reference_points: (B, S, L, 2) float32 xy, see `grid_reference_points`.
        proposals: (B, S, 4) float32 cxcywh before the sigmoid, see `make_proposals`.
        valid: (B, S) bool, True where a token has a proposal.
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
    """Compute the geometry of a batch, or take it from the cache.

    Args:
        shapes: (h, w) of each level.
        masks: (B, h, w) bool mask of each level, True on real cells; None if all cells are real.
        width: Number of channels D of the position embedding.
        temperature: Temperature of the position embedding.
        device: Device of the result if there are no masks.

    Returns:
        The geometry. It may be cached, so do not write to its tensors.
    """
    if masks is not None:
        return _compute(shapes, masks, width, temperature)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _unpadded(shapes, width, temperature, device)
    return _cached(shapes, width, temperature, device)


@functools.lru_cache(maxsize=4)
def _cached(shapes: Shapes, width: int, temperature: float, device: torch.device) -> ImageGeometry:
    # Tensors made in inference mode could not be used in training later.
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
    """Return the share of a map's width and height that is real: (B, h, w) bool to (B, 2) float32 xy."""
    width = mask[:, 0, :].sum(1).float() / mask.shape[2]
    height = mask[:, :, 0].sum(1).float() / mask.shape[1]
    return torch.stack((width, height), dim=-1)


def grid_centers(height: int, width: int, device: torch.device) -> Tensor:
    """Return the centre of every cell of a map, row by row.

    Args:
        height: Number of rows.
        width: Number of columns.
        device: Device of the result.

    Returns:
        (h * w, 2) float32 xy, in cells.
    """
    y = torch.arange(height, dtype=torch.float32, device=device) + 0.5
    x = torch.arange(width, dtype=torch.float32, device=device) + 0.5
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((grid_x, grid_y), dim=-1).flatten(0, 1)


def grid_reference_points(spatial_shapes: Sequence[tuple[int, int]], valid_ratios: Tensor) -> Tensor:
    """Return each image token's reference point on every level, from which deformable attention samples.

    Args:
        spatial_shapes: (h, w) of each level.
        valid_ratios: (B, L, 2) float32 xy share of each level that is not padding.

    Returns:
        (B, S, L, 2) float32 xy, in [0, 1] of the padded map for real tokens.
    """
    points = []
    for level, (height, width) in enumerate(spatial_shapes):
        centers = grid_centers(height, width, valid_ratios.device)
        sides = torch.stack((valid_ratios[:, level, 0] * width, valid_ratios[:, level, 1] * height), dim=-1)
        points.append(centers[None] / sides[:, None])
    return torch.cat(points, dim=1)[:, :, None] * valid_ratios[:, None]


def make_proposals(
    spatial_shapes: Sequence[tuple[int, int]], vision_mask: Tensor, masks: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Make a square proposal around every image token, with sides of 0.05 * 2^level of the image's.

    Args:
        spatial_shapes: (h, w) of each level.
        vision_mask: (B, S) bool, True on real tokens.
        masks: (B, h, w) bool mask of each level, True on real cells.

    Returns:
        The proposals, (B, S, 4) float32 cxcywh before the sigmoid, +inf where a token has none; and (B, S) bool, True
        where a token has one.
    """
    boxes = []
    for level, ((height, width), mask) in enumerate(zip(spatial_shapes, masks, strict=True)):
        sides = torch.stack((mask[:, 0, :].sum(1), mask[:, :, 0].sum(1)), dim=-1).float()
        centers = grid_centers(height, width, mask.device)[None] / sides[:, None]
        boxes.append(torch.cat((centers, torch.full_like(centers, _BASE_SIZE * 2.0**level)), dim=-1))
    proposals = torch.cat(boxes, dim=1)
    inside = (proposals > _MARGIN + _ON_MARGIN) & (proposals < 1 - _MARGIN - _ON_MARGIN)
    valid = inside.all(-1) & vision_mask
    logits = torch.log(proposals / (1 - proposals))
    return logits.masked_fill(~valid[..., None], torch.inf), valid
