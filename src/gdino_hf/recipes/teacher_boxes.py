"""A closed-set detector's boxes as soft targets of the decoder, on every photograph, annotated or not.

`dense_loss` of closed_set_teacher.py teaches the encoder's proposals, one per cell. The decoder has another task: of
many cells that see one object it must keep one query. Here its queries are matched one to one with the teacher's boxes
after non-maximum suppression, and each matched query learns the teacher's score for the label and the teacher's box.
Unmatched queries learn 0 for every label that the teacher knows, so duplicates cost as much as false alarms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.box_ops import batched_nms, cxcywh_to_xyxy, elementwise_giou
from ..model.matcher import MatchingCosts, hungarian_match
from ..model.targets import Targets
from .closed_set_teacher import DenseLoss

# Fainter boxes carry less information about the picture than about the teacher's noise.
MIN_SCORE = 0.05
# Boxes of one class that overlap more are the same object; the detector's own publication suppresses at this IoU.
SAME_OBJECT_IOU = 0.6
# An image has 100 queries, most of which must stay free to learn what is not there.
MOST_BOXES = 40


@dataclass(frozen=True)
class TeacherBoxes:
    """The teacher's boxes of a batch of images.

    Attributes:
        targets: The M boxes and the prompt tokens that name each.
        scores: (M,) the teacher's scores in [0, 1].
        taught: (B, T) bool, True on tokens whose target is known: those of labels that the teacher knows, and special
            tokens.
    """

    targets: Targets
    scores: Tensor
    taught: Tensor


@torch.no_grad()
def teacher_boxes(
    scores: Tensor, boxes: Tensor, phrase_classes: Tensor, phrase_ids: Tensor, attention_mask: Tensor
) -> TeacherBoxes:
    """Select the teacher's boxes of the classes in each prompt.

    Args:
        scores: (B, S, C) in [0, 1], the teacher's scores of all cells.
        boxes: (B, S, 4) cxcywh in [0, 1].
        phrase_classes: (B, N) int64 class of each label of the prompt, -1 for a label the teacher does not know.
        phrase_ids: (B, T) index of the label that each token belongs to, -1 on special tokens and padding.
        attention_mask: (B, T) nonzero on real tokens.

    Returns:
        At most `MOST_BOXES` boxes per image, the likeliest first.
    """
    token_classes = phrase_classes.gather(1, phrase_ids.clamp(min=0)).masked_fill(phrase_ids < 0, -1)
    real = attention_mask > 0
    kept_boxes, kept_scores, maps, labels, sizes = [], [], [], [], []
    for image in range(len(scores)):
        asked = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
        asked[phrase_classes[image][phrase_classes[image] >= 0]] = True
        cell, label = ((scores[image] > MIN_SCORE) & asked).nonzero(as_tuple=True)
        found = scores[image][cell, label]
        chosen = batched_nms(cxcywh_to_xyxy(boxes[image][cell]), found, label, SAME_OBJECT_IOU)[:MOST_BOXES]
        kept_boxes.append(boxes[image][cell[chosen]])
        kept_scores.append(found[chosen])
        labels.append(label[chosen])
        # Several labels of one prompt may mean the same class; then all of their tokens name the box.
        maps.append(token_classes[image] == label[chosen][:, None])
        sizes.append(len(chosen))
    counts = torch.tensor(sizes, device=scores.device)
    targets = Targets(
        boxes=torch.cat(kept_boxes).float(),
        class_labels=torch.cat(labels),
        positive_maps=torch.cat(maps),
        batch_index=torch.arange(len(sizes), device=scores.device).repeat_interleave(counts),
        sizes=sizes,
    )
    return TeacherBoxes(targets, torch.cat(kept_scores), real & ((token_classes >= 0) | (phrase_ids < 0)))


def set_loss(
    logits: Sequence[Tensor], boxes: Sequence[Tensor], teacher: TeacherBoxes, text_mask: Tensor, costs: MatchingCosts
) -> DenseLoss:
    """Compare the queries of all decoder layers with the teacher's boxes, one query for each box.

    The class term is |y - p|^2 BCE(p, y) for each query and token (quality focal loss, Li et al. 2020, equation 2): y
    is the teacher's score on the tokens that name the matched box, and 0 elsewhere. Box terms are weighted by it.

    Args:
        logits: (B, Q, >= T) token logits of each layer.
        boxes: (B, Q, 4) cxcywh in [0, 1] of each layer.
        teacher: The teacher's boxes.
        text_mask: (B, T) bool, True on real tokens.
        costs: Weights of the matching cost.

    Returns:
        The three terms, sums over batch and layers divided by the teacher's total score.
    """
    targets, num_tokens = teacher.targets, text_mask.shape[1]
    logits = [x[..., :num_tokens].float() for x in logits]
    total = teacher.scores.sum().clamp(min=1)
    matched = hungarian_match(logits, boxes, targets, text_mask, costs)
    ce, bbox, giou = [], [], []
    for layer_logits, layer_boxes, (chosen, query) in zip(logits, boxes, matched, strict=True):
        image, score = targets.batch_index[chosen], teacher.scores[chosen]
        wanted = torch.zeros_like(layer_logits)
        wanted[image, query] = score[:, None] * targets.positive_maps[chosen].to(wanted.dtype)
        layer_logits = layer_logits.masked_fill(~teacher.taught[:, None], 0.0)
        focus = (layer_logits.detach().sigmoid() - wanted) ** 2
        terms = focus * F.binary_cross_entropy_with_logits(layer_logits, wanted, reduction="none")
        ce.append((terms * teacher.taught[:, None]).sum())
        predicted, true = layer_boxes[image, query].float(), targets.boxes[chosen]
        bbox.append(((predicted - true).abs().sum(-1) * score).sum())
        overlap = elementwise_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(true))
        giou.append(((1 - overlap) * score).sum())
    return DenseLoss(*(torch.stack(terms).sum() / total for terms in (ce, bbox, giou)))
