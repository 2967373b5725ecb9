"""Box formats, overlaps, the inverse sigmoid of coordinates, and non-maximum suppression.

Everything is computed in float32 even if the inputs are in half precision (float64 stays float64). In bfloat16, a
coordinate is off by up to two pixels in an image 1000 wide, and areas and their differences are off by far more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Smallest area to divide by: that of a box whose sides are a millionth of the image's. Real boxes are larger, and for
# two empty boxes it turns 0 / 0 into 0 with a gradient of 0.
MIN_AREA = 1e-12

# Number of boxes that nms compares with the kept boxes at once; bounds its memory.
NMS_BLOCK = 2048


def at_least_float32(x: Tensor) -> Tensor:
    """Convert a tensor to float32 unless it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes from centre and size to corners.

    Args:
        boxes: (..., 4) cx, cy, w, h in any unit.

    Returns:
        (..., 4) x0, y0, x1, y1 in the same unit, float32 or wider.
    """
    cx, cy, w, h = at_least_float32(boxes).unbind(-1)
    return torch.stack((cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes from corners to centre and size.

    Args:
        boxes: (..., 4) x0, y0, x1, y1 in any unit.

    Returns:
        (..., 4) cx, cy, w, h in the same unit, float32 or wider.
    """
    x0, y0, x1, y1 = at_least_float32(boxes).unbind(-1)
    return torch.stack((0.5 * (x0 + x1), 0.5 * (y0 + y1), x1 - x0, y1 - y0), dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Return the area of boxes, 0 if their corners are swapped.

    Args:
        boxes: (..., 4) xyxy.

    Returns:
        (...) areas in the squared unit of the boxes.
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
    """Return the intersection over union of corresponding boxes.

    Args:
        a: (..., 4) xyxy in any unit.
        b: (..., 4) xyxy in the same unit; a and b broadcast.

    Returns:
        (...) IoU in [0, 1]; two empty boxes give 0.
    """
    return _iou_and_union(at_least_float32(a), at_least_float32(b))[0]


def elementwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalized IoU of corresponding boxes (Rezatofighi et al. 2019, algorithm 1).

    GIoU(a, b) = |a n b| / |a u b| - |C - (a u b)| / |C|, with C the smallest box around both

    Args:
        a: (..., 4) xyxy in any unit.
        b: (..., 4) xyxy in the same unit; a and b broadcast.

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
    """Return the intersection over union of every box of one set with every box of another.

    Args:
        a: (N, 4) xyxy in any unit.
        b: (M, 4) xyxy in the same unit.

    Returns:
        (N, M) IoU in [0, 1].
    """
    return elementwise_iou(a[..., :, None, :], b[..., None, :, :])


def generalized_box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalized IoU of every box of one set with every box of another; see `elementwise_giou`.

    Args:
        a: (N, 4) xyxy in any unit.
        b: (M, 4) xyxy in the same unit.

    Returns:
        (N, M) GIoU in [-1, 1].
    """
    return elementwise_giou(a[..., :, None, :], b[..., None, :, :])


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return the logit of x, finite at 0 and 1: log( max(x, eps) / max(1 - x, eps) ).

    Args:
        x: Values in [0, 1] in any shape; values outside are clamped.
        eps: Smallest value of x and of 1 - x, positive. Published checkpoints differ in it, so the model takes it from
            its configuration.

    Returns:
        Logits in the shape of x, float32 or wider.
    """
    x = at_least_float32(x).clamp(min=0.0, max=1.0)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Apply greedy non-maximum suppression to all boxes, regardless of their class.

    Args:
        boxes: (N, 4) xyxy in any unit.
        scores: (N,) scores, higher is better. If two are equal, the earlier box is kept.
        threshold: A box is dropped if its IoU with a better kept box is above this, in [0, 1].

    Returns:
        (K,) int64 indices of the kept boxes, best first.

    Raises:
        ValueError: The shapes of boxes and scores do not fit.
    """
    return _greedy_nms(boxes, scores, None, threshold)


def batched_nms(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Apply greedy non-maximum suppression within each class.

    Args:
        boxes: (N, 4) xyxy in any unit.
        scores: (N,) scores, higher is better. If two are equal, the earlier box is kept.
        classes: (N,) integer class (or any other group) of each box.
        threshold: A box is dropped if its IoU with a better kept box of its class is above this, in [0, 1].

    Returns:
        (K,) int64 indices of the kept boxes, best first over all classes.

    Raises:
        ValueError: The shapes of boxes, scores and classes do not fit.
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
        # Greedy suppression keeps a box unless it overlaps a better box that is kept. Starting with all boxes kept and
        # applying this rule to all at once, each pass settles at least one more box for good. Chains of overlaps are
        # short in practice, so a few passes replace a loop over N boxes.
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


def box_scale(target_sizes: Tensor | Sequence[tuple[int, int]], boxes: Tensor) -> Tensor:
    """Return the (B, 4) factors that scale xyxy boxes from 0..1 to pixels.

    Args:
        target_sizes: (height, width) of each image in pixels.
        boxes: Boxes (B, Q, 4), which give the device and the number of images.

    Returns:
        (width, height, width, height) of each image.

    Raises:
        ValueError: The number of sizes is not the number of images.
    """
    if not isinstance(target_sizes, Tensor):
        target_sizes = torch.stack([torch.as_tensor(size, dtype=torch.float32).cpu() for size in target_sizes])
    sizes = target_sizes.to(boxes.device, torch.float32).reshape(-1, 2)
    if sizes.shape[0] != boxes.shape[0]:
        raise ValueError(f"There are {sizes.shape[0]} target_sizes for {boxes.shape[0]} images; give one each.")
    return sizes.flip(-1).repeat(1, 2)


def check_outputs(outputs: Any) -> None:
    """Refuse outputs that are NaN, whose scores would pass no threshold, as if nothing were in the picture.

    Args:
        outputs: Model output with logits and pred_boxes.

    Raises:
        ValueError: A logit is NaN, or a box is not finite.
    """
    if outputs.logits.isnan().any() or not outputs.pred_boxes.isfinite().all():
        raise ValueError(
            f"The model's outputs in {outputs.logits.dtype} hold NaN; load it in float32 or bfloat16, and check its "
            "weights and the pixels that it was given."
        )
