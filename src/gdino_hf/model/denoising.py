"""Contrastive denoising queries: noisy copies of annotated boxes, which the decoder learns to repair or to reject.

Matching is unstable early in training. Queries whose target is known teach the decoder to refine boxes from the first
step on (DN-DETR, Li et al. 2022). Contrastive denoising (DINO, Zhang et al. 2022, 3.3) pairs each slightly moved box, a
positive, with a strongly moved one, a negative that must be predicted as "no object". Here the feature of such a query
is the text feature of its label rather than a learned class embedding, so any vocabulary works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .box_ops import cxcywh_to_xyxy, xyxy_to_cxcywh
from .targets import Targets, phrase_counts


@dataclass(frozen=True)
class DenoisingLayout:
    """Which slot of the denoising queries belongs to which box; it follows from the labels without random numbers.

    There are P = num_groups * 2 * N slots, where N is the largest number of boxes of an image: each group has N
    positives, then N negatives. Images with fewer boxes leave slots empty, which attention and the loss ignore.

    Attributes:
        num_groups: Number of independent noisy copies of the annotation.
        real: (B, P) bool, False on empty slots.
        target_index: (K,) row of each positive's box in `Targets`; K = num_groups * M.
        batch_index: (K,) index of each positive's image.
        query_index: (K,) slot of each positive.
    """

    num_groups: int
    real: Tensor
    target_index: Tensor
    batch_index: Tensor
    query_index: Tensor

    @property
    def num_queries(self) -> int:
        """Number of denoising queries P of each image."""
        return self.real.shape[1]


@dataclass(frozen=True)
class DenoisingQueries(DenoisingLayout):
    """Denoising queries, which come before the matching queries in the decoder, and their targets.

    Attributes:
        content: (B, P, D) features of the queries.
        reference_points: (B, P, 4) float32 cxcywh in [0, 1], the noisy boxes.
        attention_mask: (B, 1, P + Q, P + Q) bool, True = the row's query may attend to the column's.
    """

    content: Tensor
    reference_points: Tensor
    attention_mask: Tensor


def denoising_layout(targets: Targets, num_denoising_queries: int) -> DenoisingLayout | None:
    """Distribute noisy copies of the annotated boxes over slots.

    Args:
        targets: The annotated boxes of the batch.
        num_denoising_queries: Number of positives of each image to aim for, see `make_denoising_queries`.

    Returns:
        The layout, or None if no image has a box or denoising is off.
    """
    if num_denoising_queries <= 0 or targets.num_boxes == 0:
        return None
    num_groups = max(1, num_denoising_queries // max(targets.sizes))
    return _layout(targets, num_groups, *_slots(targets, num_groups))


def _slots(targets: Targets, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the copy, the image and the slot of every noisy box, in the order (group, positive or negative, box)."""
    device, copies = targets.boxes.device, 2 * num_groups
    copy = torch.arange(copies, device=device).repeat_interleave(targets.num_boxes)
    place = torch.cat([torch.arange(size, device=device) for size in targets.sizes])
    return copy, targets.batch_index.repeat(copies), copy * max(targets.sizes) + place.repeat(copies)


def _layout(targets: Targets, num_groups: int, copy: Tensor, batch_index: Tensor, slot: Tensor) -> DenoisingLayout:
    num_slots = 2 * num_groups * max(targets.sizes)
    real = torch.zeros(len(targets.sizes), num_slots, dtype=torch.bool, device=slot.device)
    real[batch_index, slot] = True
    rows = torch.arange(len(copy), device=slot.device)
    positives = rows.view(num_groups, 2, targets.num_boxes)[:, 0].flatten()
    return DenoisingLayout(
        num_groups=num_groups,
        real=real,
        target_index=positives % targets.num_boxes,
        batch_index=batch_index[positives],
        query_index=slot[positives],
    )


def make_denoising_queries(
    targets: Targets,
    phrase_ids: Tensor,
    text_features: Tensor,
    *,
    num_denoising_queries: int,
    label_noise: float,
    box_noise: float,
    num_queries: int,
    label_embedding: nn.Embedding | None = None,
    generator: torch.Generator | None = None,
) -> DenoisingQueries | None:
    """Make noisy copies of the annotated boxes, in groups whose number follows from num_denoising_queries.

    Args:
        targets: The annotated boxes of the batch.
        phrase_ids: (B, T) number of the label that each token belongs to, -1 on special tokens and padding.
        text_features: (B, T, D) text features that the decoder attends to.
        num_denoising_queries: Number of positives of each image to aim for. The number of groups is this divided by
            the largest number of boxes of an image, at least 1. There are as many negatives. 0 turns denoising off.
        label_noise: A label is replaced by a random one from its image's prompt with probability `label_noise / 2`, as
            published.
        box_noise: Every corner coordinate of a positive moves by less than `box_noise / 2` of the box's side, that of
            a negative by `box_noise / 2` to `box_noise`.
        num_queries: Number of matching queries Q, which follow in the decoder.
        label_embedding: Table to take the queries' features from, by the label's index in the prompt, modulo the size
            of the table. None takes them from the text features.
        generator: Random generator on the device of `phrase_ids`; None for torch's global one.

    Returns:
        The queries, or None if no image has a box or denoising is off.
    """
    if num_denoising_queries <= 0 or targets.num_boxes == 0:
        return None
    device, batch_size, most = phrase_ids.device, phrase_ids.shape[0], max(targets.sizes)
    num_groups = max(1, num_denoising_queries // most)
    copy, batch_index, slot = _slots(targets, num_groups)
    layout = _layout(targets, num_groups, copy, batch_index, slot)
    target_index = torch.arange(targets.num_boxes, device=device).repeat(2 * num_groups)
    negative, num_rows, num_slots = copy % 2 == 1, len(copy), layout.num_queries

    flipped = _uniform((num_rows,), device, generator) < 0.5 * label_noise
    num_labels = phrase_counts(phrase_ids)[batch_index]
    any_label = (_uniform((num_rows,), device, generator) * num_labels).long().clamp(max=num_labels - 1)
    labels = torch.where(flipped, any_label, targets.class_labels[target_index])
    if label_embedding is None:
        own_tokens = targets.positive_maps[target_index]
        tokens = torch.where(flipped[:, None], phrase_ids[batch_index] == labels[:, None], own_tokens)
        weights = tokens.to(text_features.dtype)
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1)
        maps = weights.new_zeros(batch_size, num_slots, phrase_ids.shape[1])
        maps[batch_index, slot] = weights
        content = (maps @ text_features).to(text_features.dtype)
    else:
        rows = label_embedding(labels % label_embedding.num_embeddings).to(text_features.dtype)
        content = text_features.new_zeros(batch_size, num_slots, rows.shape[-1])
        content[batch_index, slot] = rows

    noisy = jitter_boxes(targets.boxes[target_index], negative, box_noise, generator)
    # Nothing attends to an empty slot, so any finite box will do.
    reference_points = torch.full((batch_size, num_slots, 4), 0.5, device=device)
    reference_points[batch_index, slot] = noisy
    group = torch.arange(num_slots, device=device) // (2 * most)
    return DenoisingQueries(
        num_groups=num_groups,
        real=layout.real,
        target_index=layout.target_index,
        batch_index=layout.batch_index,
        query_index=layout.query_index,
        content=content,
        reference_points=reference_points,
        attention_mask=denoising_attention_mask(group, layout.real, num_queries),
    )


def _uniform(shape: Sequence[int], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Draw numbers from [0, 1)."""
    if generator is None:
        # torch.compile cannot trace `generator=None` once a size is symbolic.
        return torch.rand(tuple(shape), device=device)
    return torch.rand(tuple(shape), device=device, generator=generator)


def jitter_boxes(boxes: Tensor, negative: Tensor, box_noise: float, generator: torch.Generator | None = None) -> Tensor:
    """Move each corner coordinate of each box by a random share of the box's side, in a random direction.

    The share is `box_noise / 2` times a random number, from [0, 1) for positives and from [1, 2) for negatives.

    Args:
        boxes: (R, 4) cxcywh in [0, 1].
        negative: (R,) bool, True on negatives.
        box_noise: Scale of the noise, as a share of the box's side.
        generator: Random generator on the device of `boxes`; None for torch's global one.

    Returns:
        (R, 4) cxcywh in [0, 1]. A box whose corners moved past each other has a side of 0.
    """
    half = 0.5 * boxes[:, 2:].repeat(1, 2)
    sign = 2.0 * (_uniform(boxes.shape, boxes.device, generator) < 0.5).to(boxes.dtype) - 1.0
    share = _uniform(boxes.shape, boxes.device, generator) + negative[:, None]
    corners = cxcywh_to_xyxy(boxes) + box_noise * sign * share * half
    return xyxy_to_cxcywh(corners.clamp(0, 1)).clamp(min=0)


def denoising_attention_mask(group: Tensor, real: Tensor, num_queries: int) -> Tensor:
    """Make the mask of self-attention among denoising and matching queries.

    A group attends to itself and to the matching queries. Matching queries never attend to denoising queries, which
    contain the answer: they would learn to copy it.

    Args:
        group: (P,) group of each denoising slot.
        real: (B, P) bool, False on empty slots.
        num_queries: Number of matching queries Q, which come after the denoising queries.

    Returns:
        (B, 1, P + Q, P + Q) bool, True = may attend. Every query may attend to itself.
    """
    num_slots = group.shape[0]
    mask = torch.ones(num_slots + num_queries, num_slots + num_queries, dtype=torch.bool, device=group.device)
    mask[num_slots:, :num_slots] = False
    mask[:num_slots, :num_slots] = group[:, None] == group[None, :]
    visible = torch.nn.functional.pad(real, (0, num_queries), value=True)
    itself = torch.eye(num_slots + num_queries, dtype=torch.bool, device=group.device)
    return ((mask & visible[:, None, :]) | itself)[:, None]
