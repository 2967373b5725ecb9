"""Boxes: formats, overlaps, the logit of a coordinate, and non-maximum suppression.

Everything here is computed in float32 even when the inputs are half precision (float64 stays float64): a bfloat16
coordinate is off by up to two pixels in an image 1000 wide, and an area or a difference of areas by far more.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Areas below this count as empty. In 0..1 coordinates it is a box a millionth of the image wide and high, so no real
# box meets it, and it keeps 0 / 0 of two degenerate boxes at 0 with a zero gradient.
MIN_AREA = 1e-12

# Rows of the suppression matrix held at once; bounds the memory of nms at block x kept boxes.
NMS_BLOCK = 2048


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or unchanged where it is float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Turn centre and size into corners.

    Args:
        boxes: (..., 4) cx, cy, w, h in any unit.

    Returns:
        (..., 4) x0, y0, x1, y1 in the same unit, float32 or wider.
    """
    cx, cy, w, h = at_least_float32(boxes).unbind(-1)
    return torch.stack((cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Turn corners into centre and size.

    Args:
        boxes: (..., 4) x0, y0, x1, y1 in any unit.

    Returns:
        (..., 4) cx, cy, w, h in the same unit, float32 or wider.
    """
    x0, y0, x1, y1 = at_least_float32(boxes).unbind(-1)
    return torch.stack((0.5 * (x0 + x1), 0.5 * (y0 + y1), x1 - x0, y1 - y0), dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Area of corner boxes; a box whose corners are swapped has none.

    Args:
        boxes: (..., 4) xyxy.

    Returns:
        (...) areas in the unit of the boxes, squared.
    """
    boxes = at_least_float32(boxes)
    width, height = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).unbind(-1)
    return width * height


def _iou_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    top_left = torch.maximum(a[..., :2], b[..., :2])
    bottom_right = torch.minimum(a[..., 2:], b[..., 2:])
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    intersection = width * height
    union = (box_area(a) + box_area(b) - intersection).clamp(min=MIN_AREA)
    return intersection / union, union


def elementwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes at the same place in two broadcastable tensors.

    Args:
        a: (..., 4) xyxy.
        b: (..., 4) xyxy, broadcastable with `a`.

    Returns:
        (...) IoU in [0, 1]; two empty boxes give 0.
    """
    return _iou_and_union(at_least_float32(a), at_least_float32(b))[0]


def elementwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized IoU of boxes at the same place in two broadcastable tensors.

    GIoU(a, b) = |a n b| / |a u b| - |C - (a u b)| / |C|, with C the smallest box around both (Rezatofighi et al. 2019,
    equation 1 and algorithm 1).

    Args:
        a: (..., 4) xyxy.
        b: (..., 4) xyxy, broadcastable with `a`.

    Returns:
        (...) GIoU in [-1, 1].
    """
    a, b = at_least_float32(a), at_least_float32(b)
    iou, union = _iou_and_union(a, b)
    top_left = torch.minimum(a[..., :2], b[..., :2])
    bottom_right = torch.maximum(a[..., 2:], b[..., 2:])
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    hull = (width * height).clamp(min=MIN_AREA)
    return iou - (hull - union) / hull


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of one set with every box of another.

    Args:
        a: (N, 4) xyxy.
        b: (M, 4) xyxy.

    Returns:
        (N, M) IoU in [0, 1].
    """
    return elementwise_iou(a[..., :, None, :], b[..., None, :, :])


def generalized_box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized IoU of every box of one set with every box of another; see `elementwise_giou`.

    Args:
        a: (N, 4) xyxy.
        b: (M, 4) xyxy.

    Returns:
        (N, M) GIoU in [-1, 1].
    """
    return elementwise_giou(a[..., :, None, :], b[..., None, :, :])


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """The logit of x, with both x and 1 - x held at `eps` or above.

    Args:
        x: any shape, values in [0, 1] (values outside are clamped).
        eps: the smallest probability that is told from zero. Published checkpoints differ in it, so the model takes
            it from `config.inverse_sigmoid_eps`.

    Returns:
        log(max(x, eps) / max(1 - x, eps)), float32 or wider.
    """
    x = at_least_float32(x).clamp(min=0.0, max=1.0)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Greedy non-maximum suppression over all boxes, whatever their class.

    Args:
        boxes: (N, 4) xyxy.
        scores: (N,) the higher the better; of equal scores the earlier box wins.
        threshold: a box is dropped when its IoU with a better kept box is above this.

    Returns:
        (K,) int64 indices of the kept boxes, best first.

    Raises:
        ValueError: if boxes and scores do not belong together.
    """
    return _greedy_nms(boxes, scores, None, threshold)


def batched_nms(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Greedy non-maximum suppression inside each class; boxes of different classes never touch each other.

    Args:
        boxes: (N, 4) xyxy.
        scores: (N,) the higher the better; of equal scores the earlier box wins.
        classes: (N,) integer class (or any other group) of each box.
        threshold: a box is dropped when its IoU with a better kept box of its class is above this.

    Returns:
        (K,) int64 indices of the kept boxes, best first over all classes.

    Raises:
        ValueError: if boxes, scores and classes do not belong together.
    """
    if classes.shape != scores.shape:
        raise ValueError(
            f"classes has shape {tuple(classes.shape)}, expected one class per score {tuple(scores.shape)}."
        )
    return _greedy_nms(boxes, scores, classes, threshold)


def _greedy_nms(boxes: Tensor, scores: Tensor, classes: Tensor | None, threshold: float) -> Tensor:
    if boxes.ndim != 2 or boxes.shape[-1] != 4 or scores.shape != boxes.shape[:1]:
        raise ValueError(
            f"boxes {tuple(boxes.shape)} and scores {tuple(scores.shape)} must be shaped (N, 4) and (N,) with one N."
        )
    order = torch.argsort(scores, descending=True, stable=True)
    kept = order[:0]
    for block in order.split(NMS_BLOCK):
        if kept.numel():
            block = block[~_overlaps(kept, block, boxes, classes, threshold).any(dim=0)]
        # Greedy NMS is the one fixed point of "a box stays unless a better box that stays overlaps it". Starting from
        # "all stay", each pass settles at least the best box still open, and chains of overlaps are short in practice,
        # so this takes a few vectorised passes where a loop over boxes would take N.
        suppresses = _overlaps(block, block, boxes, classes, threshold).triu(diagonal=1)
        stays = torch.ones_like(block, dtype=torch.bool)
        while True:
            updated = ~(suppresses & stays[:, None]).any(dim=0)
            if torch.equal(updated, stays):
                break
            stays = updated
        kept = torch.cat((kept, block[stays]))
    return kept


def _overlaps(rows: Tensor, columns: Tensor, boxes: Tensor, classes: Tensor | None, threshold: float) -> Tensor:
    overlaps = box_iou(boxes[rows], boxes[columns]) > threshold
    if classes is not None:
        overlaps &= classes[rows][:, None] == classes[columns][None, :]
    return overlaps
