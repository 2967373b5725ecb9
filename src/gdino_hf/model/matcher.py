"""Hungarian matching: a one-to-one assignment of queries to annotated boxes at the least total cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .box_ops import at_least_float32, cxcywh_to_xyxy, elementwise_giou
from .targets import Targets

_NOT_FINITE = (
    "Predictions are NaN or infinite and cannot be matched; look for NaN or infinity in pixel_values, lower the "
    "learning rate, clip gradients, or train in bfloat16 rather than float16."
)


@dataclass(frozen=True)
class MatchingCosts:
    """Weights of the matching cost's terms and parameters of its focal term.

    Attributes:
        class_cost: Weight of the classification term.
        bbox_cost: Weight of the L1 distance.
        giou_cost: Weight of the generalized IoU.
        focal_alpha: Weight in [0, 1] of positives in the focal term; negatives weigh 1 - focal_alpha.
        focal_gamma: How quickly tokens that are classified well lose weight, at least 0.
    """

    class_cost: float
    bbox_cost: float
    giou_cost: float
    focal_alpha: float
    focal_gamma: float


def matching_cost(
    logits: Tensor, pred_boxes: Tensor, targets: Targets, text_mask: Tensor, costs: MatchingCosts
) -> Tensor:
    """Compute the cost of assigning each annotated box to each query of its image.

    cost(m, q) = class_cost * mean over the tokens t that name box m of [focal(logit_qt, 1) - focal(logit_qt, 0)]
               + bbox_cost * |box_m - box_q|_1 - giou_cost * GIoU(box_m, box_q)

    Because of the mean, a label of many tokens does not outweigh a label of one token.

    Args:
        logits: (B, Q, T) token logits of one layer.
        pred_boxes: (B, Q, 4) cxcywh in [0, 1].
        targets: The M annotated boxes of the batch.
        text_mask: (B, T) bool, True on real tokens. Logits of other tokens may be -inf.
        costs: Weights of the terms.

    Returns:
        (M, Q) float32 costs on the device of the predictions.
    """
    # In half precision, near-equal costs would change their order; autocast would compute the product below in it.
    with torch.autocast(device_type=logits.device.type, enabled=False):
        logits = at_least_float32(logits).masked_fill(~text_mask[:, None, :], 0.0)
        probability = logits.sigmoid()
        if_named = costs.focal_alpha * (1 - probability) ** costs.focal_gamma * F.softplus(-logits)
        if_not = (1 - costs.focal_alpha) * probability**costs.focal_gamma * F.softplus(logits)

        # Boxes are padded to (B, N, T), N the most boxes of an image, for one batched product.
        sizes, most = targets.sizes, max(targets.sizes)
        slot = torch.cat([torch.arange(size, device=logits.device) for size in sizes])
        maps = logits.new_zeros(len(sizes), most, logits.shape[-1])
        weights = targets.positive_maps.to(logits.dtype)
        maps[targets.batch_index, slot] = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1)
        classes = (maps @ (if_named - if_not).transpose(1, 2))[targets.batch_index, slot]

        candidates = at_least_float32(pred_boxes)[targets.batch_index]
        boxes = targets.boxes[:, None, :]
        distance = (candidates - boxes).abs().sum(dim=-1)
        overlap = elementwise_giou(cxcywh_to_xyxy(candidates), cxcywh_to_xyxy(boxes))
        return costs.class_cost * classes + costs.bbox_cost * distance - costs.giou_cost * overlap


@torch.compiler.disable
@torch.no_grad()
def hungarian_match(
    logits: Sequence[Tensor], pred_boxes: Sequence[Tensor], targets: Targets, text_mask: Tensor, costs: MatchingCosts
) -> list[tuple[Tensor, Tensor]]:
    """Match the queries of every layer with the annotated boxes of their image (DETR, Carion et al. 2020, equation 1).

    sigma = argmin over one-to-one assignments of sum_m cost(m, sigma(m))

    All costs are copied to the host at once, since every copy waits for the device. This is the only place where
    torch.compile breaks its graph.

    Args:
        logits: (B, Q, T) token logits of each layer; Q may differ between layers.
        pred_boxes: (B, Q, 4) cxcywh in [0, 1] of each layer.
        targets: The annotated boxes of the batch.
        text_mask: (B, T) bool, True on real tokens.
        costs: Weights of the cost's terms, see `matching_cost`.

    Returns:
        `(target_index, query_index)` of each layer, both (K,) int64 on the device of the predictions: the row of each
        matched box in `targets`, ascending, and its query within its image. K is the number of boxes, or less if an
        image has more boxes than queries.

    Raises:
        ValueError: Predictions or their costs are NaN or infinite.
    """
    device = text_mask.device
    if targets.num_boxes == 0:
        # Without boxes there are no costs to check, and the loss would silently become NaN.
        shown = [x.masked_fill(~text_mask[:, None, :], 0) for x in logits]
        finite = [x.isfinite().all() for x in (*shown, *pred_boxes)]
        if not torch.stack(finite).all():
            raise ValueError(_NOT_FINITE)
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return [(empty, empty) for _ in logits]
    per_layer = [matching_cost(x, y, targets, text_mask, costs) for x, y in zip(logits, pred_boxes, strict=True)]
    on_host = torch.cat([cost.flatten() for cost in per_layer]).cpu().numpy()
    if not np.isfinite(on_host).all():
        raise ValueError(_NOT_FINITE)
    starts = np.cumsum([0, *targets.sizes])
    pairs: list[np.ndarray] = []
    position = 0
    for cost in per_layer:
        matrix = on_host[position : position + cost.numel()].reshape(cost.shape)
        position += cost.numel()
        rows, columns = [], []
        for start, end in pairwise(starts):
            row, column = linear_sum_assignment(matrix[start:end])
            rows.append(row + start)
            columns.append(column)
        pairs.append(np.stack((np.concatenate(rows), np.concatenate(columns))))
    matched = torch.from_numpy(np.concatenate(pairs, axis=1)).to(device)
    return [(target, query) for target, query in matched.split([pair.shape[1] for pair in pairs], dim=1)]
