"""Language-guided query selection: image tokens that speak most to the text become queries (Liu et al. 2023, 3.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .position_encoding import grid_centers

# Proposals nearer to the border than this, or of this relative size, have no finite inverse sigmoid worth learning.
_MARGIN = 0.01
_BASE_SIZE = 0.05


@dataclass(frozen=True)
class SelectedQueries:
    """The queries that enter the decoder.

    Attributes:
        features: (B, Q, D) normalized encoder features of the selected tokens, with gradient.
        logits: (B, Q, T) their token logits.
        box_logits: (B, Q, 4) their boxes before the sigmoid, float32, with gradient.
        all_logits: (B, S', T) logits of every token; S' is the larger of S and Q.
        all_box_logits: (B, S', 4) boxes of every token before the sigmoid, None unless asked for.
    """

    features: Tensor
    logits: Tensor
    box_logits: Tensor
    all_logits: Tensor
    all_box_logits: Tensor | None


def make_proposals(
    spatial_shapes: Sequence[tuple[int, int]], vision_mask: Tensor, masks: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """A box around every image token, 0.05 * 2^level of the image wide and high.

    Args:
        spatial_shapes: (h, w) of each level.
        vision_mask: (B, S) bool, True on real tokens.
        masks: (B, h, w) bool of each level.

    Returns:
        (B, S, 4) float32 cxcywh before the sigmoid, +inf where no proposal stands, and (B, S) bool, where one does.
    """
    boxes = []
    for level, ((height, width), mask) in enumerate(zip(spatial_shapes, masks, strict=True)):
        sides = torch.stack((mask[:, 0, :].sum(1), mask[:, :, 0].sum(1)), dim=-1).float()
        centers = grid_centers(height, width, mask.device)[None] / sides[:, None]
        boxes.append(torch.cat((centers, torch.full_like(centers, _BASE_SIZE * 2.0**level)), dim=-1))
    proposals = torch.cat(boxes, dim=1)
    valid = ((proposals > _MARGIN) & (proposals < 1 - _MARGIN)).all(-1) & vision_mask
    logits = torch.log(proposals / (1 - proposals))
    return logits.masked_fill(~valid[..., None], torch.inf), valid


def select_queries(
    vision: Tensor,
    vision_mask: Tensor,
    proposals: Tensor,
    valid: Tensor,
    num_queries: int,
    project: Callable[[Tensor], Tensor],
    class_head: Callable[[Tensor], Tensor],
    box_head: nn.Module,
    all_boxes: bool = False,
) -> SelectedQueries:
    """Take the num_queries tokens with the highest best-token logit.

    An image with fewer tokens is filled up with empty ones, so Q does not depend on the image. Padding is taken only
    when nothing else is left, so an image gives the same queries alone and in a batch.

    Args:
        vision: (B, S, D) encoder output.
        vision_mask: (B, S) bool, True on real tokens.
        proposals: (B, S, 4) float32 before the sigmoid.
        valid: (B, S) bool, where a proposal stands.
        num_queries: Q.
        project: (B, S, D) to (B, S, D): the output projection and its normalization.
        class_head: (B, S, D) to (B, S, T) logits.
        box_head: (B, S, D) to (B, S, 4) deltas.
        all_boxes: Also give the boxes that are not selected.

    Returns:
        The selected queries, best first.
    """
    missing = max(0, num_queries - vision.shape[1])
    if missing > 0:
        vision = F.pad(vision, (0, 0, 0, missing))
        proposals = F.pad(proposals, (0, 0, 0, missing), value=torch.inf)
        valid = F.pad(valid, (0, missing))
        vision_mask = F.pad(vision_mask, (0, missing))
    features = project(vision.masked_fill(~valid[..., None], 0.0))
    logits = class_head(features)
    best = logits.max(-1).values.masked_fill(~vision_mask, -torch.inf)
    index = best.topk(num_queries, dim=1).indices[..., None]

    def take(x: Tensor) -> Tensor:
        return x.gather(1, index.expand(-1, -1, x.shape[-1]))

    if all_boxes:
        boxes = box_head(features).float() + proposals
        return SelectedQueries(take(features), take(logits), take(boxes), logits, boxes)
    selected = take(features)
    return SelectedQueries(selected, take(logits), box_head(selected).float() + take(proposals), logits, None)
