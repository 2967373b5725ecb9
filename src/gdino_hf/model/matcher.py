"""Hungarian matching of predictions and annotated boxes, one to one, at least total cost."""

from __future__ import annotations

from collections.abc import Sequence
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


def matching_cost(
    logits: Tensor,
    pred_boxes: Tensor,
    targets: Targets,
    text_mask: Tensor,
    *,
    class_cost: float,
    bbox_cost: float,
    giou_cost: float,
    focal_alpha: float,
    focal_gamma: float,
) -> Tensor:
    """Cost of giving each annotated box to each query of its own image.

    cost(m, q) = class_cost * mean over the tokens t that name box m of [focal(logit_qt, 1) - focal(logit_qt, 0)]
               + bbox_cost * |box_m - box_q|_1 - giou_cost * GIoU(box_m, box_q)

    The mean, a positive map normalized to sum 1, keeps a label of many tokens from outweighing a label of one.

    Args:
        logits: (B, Q, T) token logits of one layer.
        pred_boxes: (B, Q, 4) cxcywh in [0, 1].
        targets: the batch's M annotated boxes.
        text_mask: (B, T) bool, True on real tokens; logits elsewhere may be -inf.
        class_cost, bbox_cost, giou_cost: weights of the three terms.
        focal_alpha, focal_gamma: the focal loss's parameters.

    Returns:
        (M, Q) float32 costs on the device of the predictions.
    """
    # Half precision loses the order of near-equal costs, and autocast would put the product below back into it.
    with torch.autocast(device_type=logits.device.type, enabled=False):
        logits = at_least_float32(logits).masked_fill(~text_mask[:, None, :], 0.0)
        probability = logits.sigmoid()
        if_named = focal_alpha * (1 - probability) ** focal_gamma * F.softplus(-logits)
        if_not = (1 - focal_alpha) * probability**focal_gamma * F.softplus(logits)

        # Boxes are padded to (B, N, T) for one batched product; only the (M, Q) part of it is real.
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
        return class_cost * classes + bbox_cost * distance - giou_cost * overlap


@torch.compiler.disable
@torch.no_grad()
def hungarian_match(
    logits: Sequence[Tensor],
    pred_boxes: Sequence[Tensor],
    targets: Targets,
    text_mask: Tensor,
    *,
    class_cost: float,
    bbox_cost: float,
    giou_cost: float,
    focal_alpha: float,
    focal_gamma: float,
) -> list[tuple[Tensor, Tensor]]:
    """Match every layer's queries with the annotated boxes of their image (Carion et al. 2020, equation 1).

    Costs are computed where the predictions are and travel to the host in one copy for all layers and images, because
    each copy waits for the device. torch.compile breaks its graph here and only here.

    Args:
        logits: per layer (B, Q, T) token logits; Q may differ from layer to layer.
        pred_boxes: per layer (B, Q, 4) cxcywh in [0, 1].
        targets: the batch's annotated boxes.
        text_mask: (B, T) bool, True on real tokens.
        class_cost, bbox_cost, giou_cost: weights of the cost's terms; see `matching_cost`.
        focal_alpha, focal_gamma: the focal loss's parameters.

    Returns:
        Per layer `(target_index, query_index)`, both (K,) int64 on the predictions' device: row of the box in
        `targets`, ascending, and query of its image. K is the number of boxes, less where an image has more boxes
        than queries.

    Raises:
        ValueError: if predictions, or the costs they make, are NaN or infinite.
    """
    device = text_mask.device
    if targets.num_boxes == 0:
        # Without a box there is no cost to look at, and the loss of the background would be NaN in silence.
        shown = [x.masked_fill(~text_mask[:, None, :], 0) for x in logits]
        finite = [x.isfinite().all() for x in (*shown, *pred_boxes)]
        if not torch.stack(finite).all():
            raise ValueError(_NOT_FINITE)
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return [(empty, empty) for _ in logits]
    costs = [
        matching_cost(
            layer_logits,
            layer_boxes,
            targets,
            text_mask,
            class_cost=class_cost,
            bbox_cost=bbox_cost,
            giou_cost=giou_cost,
            focal_alpha=focal_alpha,
            focal_gamma=focal_gamma,
        )
        for layer_logits, layer_boxes in zip(logits, pred_boxes, strict=True)
    ]
    on_host = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
    if not np.isfinite(on_host).all():
        raise ValueError(_NOT_FINITE)
    starts = np.cumsum([0, *targets.sizes])
    pairs: list[np.ndarray] = []
    position = 0
    for cost in costs:
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
