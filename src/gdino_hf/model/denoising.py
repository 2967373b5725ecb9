"""Contrastive denoising queries: annotated boxes with noise, which the decoder learns to repair or to refuse.

Matching is unstable early in training, so queries that know their target teach the decoder to refine boxes from the
first step (DN-DETR, Li et al. 2022). Contrastive denoising (DINO, Zhang et al. 2022, section 3.3) adds to each lightly
moved box a heavily moved one that must answer "no object". Here a query's content is the text of its label instead of
a learned class embedding, so it works for any vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .box_ops import cxcywh_to_xyxy, xyxy_to_cxcywh
from .targets import Targets, phrase_counts


@dataclass(frozen=True)
class DenoisingQueries:
    """Queries put before the matching queries of the decoder, and what the loss must know of them.

    P = num_groups * 2 * N slots, N the most boxes of one image: each group has N positives, then N negatives. Images
    with fewer boxes leave slots empty; those are hidden from attention and from the loss.

    Attributes:
        content: (B, P, D) label features.
        reference_points: (B, P, 4) float32 cxcywh in [0, 1].
        attention_mask: (B, 1, P + Q, P + Q) bool, True = the row's query may attend to the column's.
        num_groups: independent noisy copies of the annotation.
        real: (B, P) bool, False on empty slots.
        target_index: (K,) row in `Targets` of each positive, K = num_groups * M.
        batch_index: (K,) image of each positive.
        query_index: (K,) slot of each positive.
    """

    content: Tensor
    reference_points: Tensor
    attention_mask: Tensor
    num_groups: int
    real: Tensor
    target_index: Tensor
    batch_index: Tensor
    query_index: Tensor

    @property
    def num_queries(self) -> int:
        """Denoising queries of each image, P."""
        return self.content.shape[1]


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
    """Make noisy copies of the annotated boxes, in as many groups as the budget allows.

    Args:
        targets: the batch's annotated boxes.
        phrase_ids: (B, T) ordinal of the label each token belongs to, -1 on special tokens and padding.
        text_features: (B, T, D) text features the decoder attends to.
        num_denoising_queries: positives to aim for in each image; the number of groups is this over the most boxes of
            one image, at least 1, and as many negatives come on top. 0 turns denoising off.
        label_noise: a label is replaced by a random one of its own image's prompt with probability `label_noise / 2`,
            as published.
        box_noise: every corner coordinate of a positive moves by less than `box_noise / 2` of the box's side, that of
            a negative by `box_noise / 2` up to `box_noise`.
        num_queries: matching queries Q that follow in the decoder.
        label_embedding: take content from this table, by the label's place in the prompt, instead of from the text;
            labels beyond the table share its rows.
        generator: source of the noise, on the device of `phrase_ids`; the global one if None.

    Returns:
        The queries, or None where no image has a box or denoising is off.
    """
    if num_denoising_queries <= 0 or targets.num_boxes == 0:
        return None
    device, batch_size = phrase_ids.device, phrase_ids.shape[0]
    most = max(targets.sizes)
    num_groups = max(1, num_denoising_queries // most)

    # Rows run over (group, positive or negative, box): the order of the slots, less the empty ones.
    copies = 2 * num_groups
    num_rows = copies * targets.num_boxes
    copy = torch.arange(copies, device=device).repeat_interleave(targets.num_boxes)
    target_index = torch.arange(targets.num_boxes, device=device).repeat(copies)
    batch_index = targets.batch_index.repeat(copies)
    place = torch.cat([torch.arange(size, device=device) for size in targets.sizes])
    slot = copy * most + place.repeat(copies)
    negative = copy % 2 == 1

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    # Labels: most keep their own, some take any label of the same prompt.
    flipped = uniform(num_rows) < 0.5 * label_noise
    num_labels = phrase_counts(phrase_ids)[batch_index]
    any_label = (uniform(num_rows) * num_labels).long().clamp(max=num_labels - 1)
    labels = torch.where(flipped, any_label, targets.class_labels[target_index])
    num_slots = copies * most
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
    # An empty slot is a plain box in the middle: harmless, and seen by nobody.
    reference_points = torch.full((batch_size, num_slots, 4), 0.5, device=device)
    reference_points[batch_index, slot] = noisy
    real = torch.zeros(batch_size, num_slots, dtype=torch.bool, device=device)
    real[batch_index, slot] = True

    group = torch.arange(num_slots, device=device) // (2 * most)
    positives = torch.arange(num_rows, device=device).view(num_groups, 2, targets.num_boxes)[:, 0].flatten()
    return DenoisingQueries(
        content=content,
        reference_points=reference_points,
        attention_mask=denoising_attention_mask(group, real, num_queries),
        num_groups=num_groups,
        real=real,
        target_index=target_index[positives],
        batch_index=batch_index[positives],
        query_index=slot[positives],
    )


def jitter_boxes(boxes: Tensor, negative: Tensor, box_noise: float, generator: torch.Generator | None = None) -> Tensor:
    """Move each corner coordinate of each box by a random share of the box's side.

    A positive's share is `box_noise / 2` times a number in [0, 1), a negative's times one in [1, 2); signs are random.

    Args:
        boxes: (R, 4) cxcywh in [0, 1].
        negative: (R,) bool.
        box_noise: scale of the noise, in box sides.
        generator: source of the noise, on the device of `boxes`; the global one if None.

    Returns:
        (R, 4) cxcywh in [0, 1]; a box whose corners moved past each other has a side of 0.
    """
    half = 0.5 * boxes[:, 2:].repeat(1, 2)
    sign = 2.0 * (torch.rand(boxes.shape, generator=generator, device=boxes.device) < 0.5).to(boxes.dtype) - 1.0
    share = torch.rand(boxes.shape, generator=generator, device=boxes.device) + negative[:, None]
    corners = cxcywh_to_xyxy(boxes) + box_noise * sign * share * half
    return xyxy_to_cxcywh(corners.clamp(0, 1)).clamp(min=0)


def denoising_attention_mask(group: Tensor, real: Tensor, num_queries: int) -> Tensor:
    """Who may attend to whom: a group sees itself and the matching queries, these never see a denoising query.

    Denoising queries carry the answer, so a matching query that saw one would learn to copy it.

    Args:
        group: (P,) group of each denoising slot.
        real: (B, P) bool, False on empty slots.
        num_queries: matching queries Q, which stand after the denoising ones.

    Returns:
        (B, 1, P + Q, P + Q) bool, True = may attend; every row has at least itself.
    """
    num_slots = group.shape[0]
    mask = torch.ones(num_slots + num_queries, num_slots + num_queries, dtype=torch.bool, device=group.device)
    mask[num_slots:, :num_slots] = False
    mask[:num_slots, :num_slots] = group[:, None] == group[None, :]
    visible = torch.nn.functional.pad(real, (0, num_queries), value=True)
    itself = torch.eye(num_slots + num_queries, dtype=torch.bool, device=group.device)
    return ((mask & visible[:, None, :]) | itself)[:, None]
