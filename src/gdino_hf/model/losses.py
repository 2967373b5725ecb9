"""The training loss: focal loss of tokens, L1 and GIoU of matched boxes, and a region-phrase contrastive term.

Every term is a sum over the batch divided by the number of annotated boxes. The loss of a batch is therefore the mean
of its images' losses weighted by their numbers of boxes, on one device or on many. Losses are computed in float32, also
under autocast.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .box_ops import at_least_float32, cxcywh_to_xyxy, elementwise_giou
from .denoising import DenoisingLayout
from .matcher import MatchingCosts, hungarian_match
from .targets import Targets


@dataclass(frozen=True)
class LossWeights(MatchingCosts):
    """Matching costs, and weights and parameters of the loss terms, all taken from the configuration.

    Attributes:
        class_loss_coefficient: Weight of the focal loss.
        bbox_loss_coefficient: Weight of the L1 distance of boxes.
        giou_loss_coefficient: Weight of 1 - GIoU of boxes.
        contrastive_loss_coefficient: Weight of the contrastive term; 0 leaves it out.
        contrastive_temperature: Temperature of the contrastive term, positive.
        auxiliary_loss: Whether every decoder layer has a loss, not only the last.
    """

    class_loss_coefficient: float
    bbox_loss_coefficient: float
    giou_loss_coefficient: float
    contrastive_loss_coefficient: float
    contrastive_temperature: float
    auxiliary_loss: bool

    @classmethod
    def from_config(cls, config: Any) -> LossWeights:
        """Take the weights from the fields of a GDinoConfig that have the same names."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


def sigmoid_focal_loss(
    logits: Tensor, targets: Tensor, mask: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Compute binary cross-entropy that gives less weight to correct predictions (Lin et al. 2017, equation 5).

    FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t), with p_t the probability of the true answer

    Args:
        logits: (..., T) token logits; may be -inf where the mask is False.
        targets: (..., T) bool, True where the token names the query's box.
        mask: Bool mask that broadcasts to (..., T), True where the token counts.
        alpha: Weight alpha_t of positives, in [0, 1]; negatives weigh 1 - alpha.
        gamma: How quickly tokens that are classified well lose weight; 0 gives weighted cross-entropy.

    Returns:
        (..., T) losses, 0 where the mask is False. No gradient reaches those logits.
    """
    # -inf is replaced before any arithmetic, since its gradient would be NaN even if the result were masked.
    logits = at_least_float32(logits).masked_fill(~mask, 0.0)
    # With the logits of positives negated, 1 - p_t is a sigmoid and -log(p_t) a softplus, accurate in both tails.
    against = torch.where(targets, -logits, logits)
    weight = torch.where(targets, alpha, 1.0 - alpha)
    return (weight * against.sigmoid() ** gamma * F.softplus(against)).masked_fill(~mask, 0.0)


def contrastive_loss(
    region_embeddings: Tensor,
    phrase_embeddings: Tensor,
    targets: Tensor,
    temperature: float,
    same_phrase: Tensor | None = None,
    phrase_mask: Tensor | None = None,
) -> Tensor:
    """Compute the InfoNCE loss of each region over the phrases of the batch (van den Oord et al. 2018, equation 4).

    loss_r = -log( exp(s(r, p_r) / tau) / sum over phrases p of exp(s(r, p) / tau) ), with s the cosine similarity

    The sum runs over p_r and all phrases of other texts: "cat" in another image's prompt is no negative for "cat".

    Args:
        region_embeddings: (R, D) features of matched queries.
        phrase_embeddings: (P, D) features of all phrases of the batch.
        targets: (R,) int64 index of each region's phrase p_r.
        temperature: Temperature tau, positive. At a small one only the most similar wrong phrases count.
        same_phrase: (P, P) bool, True where two phrases have the same text. None if all texts differ.
        phrase_mask: (P,) bool, False on padding among the phrases. None if all are real.

    Returns:
        (R,) losses.
    """
    with torch.autocast(device_type=region_embeddings.device.type, enabled=False):
        regions = F.normalize(at_least_float32(region_embeddings), dim=-1)
        phrases = F.normalize(at_least_float32(phrase_embeddings), dim=-1)
        similarity = regions @ phrases.T / temperature
        own = torch.arange(phrases.shape[0], device=targets.device) == targets[:, None]
        left_out = torch.zeros_like(own) if same_phrase is None else same_phrase[targets]
        if phrase_mask is not None:
            left_out = left_out | ~phrase_mask
        similarity = similarity.masked_fill(left_out & ~own, -torch.inf)
        return F.cross_entropy(similarity, targets, reduction="none")


def average_num_boxes(num_boxes: int, device: torch.device) -> Tensor | float:
    """Return the average number of boxes per process, by which each process divides its summed loss.

    DistributedDataParallel averages gradients over W processes. Dividing by (boxes of all processes) / W makes that
    average equal to the gradient of one process that saw the whole batch. No other place depends on W.

    Args:
        num_boxes: Number of boxes of this process.
        device: Device used for communication.

    Returns:
        max(1, boxes of all processes) / W.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return float(max(num_boxes, 1))
    total = torch.tensor(float(num_boxes), device=device)
    torch.distributed.all_reduce(total)
    return total.clamp(min=1) / torch.distributed.get_world_size()


def detection_losses(
    weights: LossWeights,
    targets: Targets,
    *,
    phrase_ids: Tensor,
    attention_mask: Tensor,
    decoder_logits: Tensor,
    decoder_boxes: Tensor,
    encoder_logits: Tensor | None = None,
    encoder_boxes: Tensor | None = None,
    denoising: DenoisingLayout | None = None,
    region_embeddings: Tensor | None = None,
    text_embeddings: Tensor | None = None,
    input_ids: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Match predictions with annotated boxes and compute the weighted sum of all loss terms.

    loss = sum over decoder layers, encoder proposals and denoising queries of
           class_loss_coefficient * focal + bbox_loss_coefficient * L1 + giou_loss_coefficient * (1 - GIoU)
         + contrastive_loss_coefficient * contrastive

    Args:
        weights: Weights of the terms and of the matching cost.
        targets: The annotated boxes of the batch.
        phrase_ids: (B, T) number of the label that each token belongs to, -1 on special tokens and padding.
        attention_mask: (B, T) mask, nonzero on real tokens. Special tokens are real: they are trained to stay low.
        decoder_logits: (L, B, P + Q, T or more) token logits of all decoder layers. Tokens beyond T are ignored.
        decoder_boxes: (L, B, P + Q, 4) cxcywh in [0, 1].
        encoder_logits: (B, Q', T or more) token logits of the encoder's proposals, which are matched separately. None
            if there are none.
        encoder_boxes: (B, Q', 4) cxcywh in [0, 1] of the proposals.
        denoising: The P denoising queries, which come before the Q matching queries. None if P is 0.
        region_embeddings: (B, Q, D) output of the last decoder layer, needed for the contrastive term.
        text_embeddings: (B, T, D) text features, needed for the contrastive term.
        input_ids: (B, T) tokens, which tell phrases of equal text, needed for the contrastive term.

    Returns:
        The weighted sum, and the unweighted terms by name: loss_ce, loss_bbox and loss_giou of the last decoder layer.
        A suffix marks the others: _0, _1, ... the layers before it (if weights.auxiliary_loss), _enc the proposals,
        _dn and _dn_0, ... the denoising queries. The contrastive term is loss_contrastive.

    Raises:
        ValueError: Predictions are not finite, or an input of the contrastive term is missing.
    """
    num_tokens, text_mask = attention_mask.shape[1], attention_mask > 0
    token_mask = text_mask[:, None, :]
    first = 0 if weights.auxiliary_loss else decoder_logits.shape[0] - 1
    num_denoising = 0 if denoising is None else denoising.num_queries
    all_logits, all_boxes = decoder_logits[first:, ..., :num_tokens], decoder_boxes[first:]
    logits, boxes = all_logits[:, :, num_denoising:], all_boxes[:, :, num_denoising:]
    proposals = []
    if encoder_logits is not None and encoder_boxes is not None:
        proposals.append((encoder_logits[..., :num_tokens], encoder_boxes))

    layers = [*zip(logits, boxes, strict=True), *proposals]
    matches = hungarian_match([x for x, _ in layers], [y for _, y in layers], targets, text_mask, weights)
    num_boxes = average_num_boxes(targets.num_boxes, text_mask.device)

    num_layers = logits.shape[0]
    names = [f"_{layer}" for layer in range(num_layers - 1)] + [""]
    target_index = torch.stack([target for target, _ in matches[:num_layers]])
    query_index = torch.stack([query for _, query in matches[:num_layers]])
    terms = _set_losses(weights, targets, logits, boxes, target_index, query_index, token_mask, num_boxes, names)
    for (proposal_logits, proposal_boxes), (target, query) in zip(proposals, matches[num_layers:], strict=True):
        proposal = proposal_logits[None], proposal_boxes[None], target[None], query[None]
        terms |= _set_losses(weights, targets, *proposal, token_mask, num_boxes, ["_enc"])
    if denoising is not None:
        terms |= _set_losses(
            weights,
            targets,
            all_logits[:, :, :num_denoising],
            all_boxes[:, :, :num_denoising],
            denoising.target_index.expand(num_layers, -1),
            denoising.query_index.expand(num_layers, -1),
            token_mask & denoising.real[:, :, None],
            num_boxes * denoising.num_groups,
            [f"_dn{name}" for name in names],
        )
    if weights.contrastive_loss_coefficient:
        if region_embeddings is None or text_embeddings is None or input_ids is None:
            raise ValueError(
                "contrastive_loss_coefficient is not 0 but region_embeddings, text_embeddings or input_ids is missing; "
                "pass all three to detection_losses or set the coefficient to 0."
            )
        phrases = phrase_bank(text_embeddings, phrase_ids, input_ids)
        each = _region_losses(weights, targets, region_embeddings, phrases, target_index[-1], query_index[-1])
        terms["loss_contrastive"] = each.sum() / num_boxes

    coefficients = {
        "ce": weights.class_loss_coefficient,
        "bbox": weights.bbox_loss_coefficient,
        "giou": weights.giou_loss_coefficient,
        "contrastive": weights.contrastive_loss_coefficient,
    }
    loss = torch.stack([coefficients[name.split("_")[1]] * value for name, value in terms.items()]).sum()
    return loss, terms


def absent_denoising_terms(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the denoising terms of a batch without boxes, which are 0.

    Every batch of a run then has the same terms, which DataParallel needs to gather its replicas' outputs.

    Args:
        terms: Loss terms by name, as `detection_losses` returns them without denoising queries.

    Returns:
        A term of value 0 for every term of a decoder layer.
    """
    names = [name.split("_") for name in terms if not name.endswith(("_enc", "_contrastive"))]
    zero = next(iter(terms.values())).new_zeros(())
    return {"_".join([*name[:2], "dn", *name[2:]]): zero for name in names}


def _set_losses(
    weights: LossWeights,
    targets: Targets,
    logits: Tensor,
    pred_boxes: Tensor,
    target_index: Tensor,
    query_index: Tensor,
    mask: Tensor,
    num_boxes: Tensor | float,
    names: list[str],
) -> dict[str, Tensor]:
    """Return focal, L1 and GIoU losses of L layers (L, B, Q, T) and (L, B, Q, 4), matched by (L, K) index pairs."""
    layer = torch.arange(logits.shape[0], device=logits.device)[:, None]
    image = targets.batch_index[target_index]
    tokens = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    tokens[layer, image, query_index] = targets.positive_maps[target_index]
    focal = sigmoid_focal_loss(logits, tokens, mask, weights.focal_alpha, weights.focal_gamma).sum(dim=(1, 2, 3))

    # Without boxes these sums are 0, yet they give every box head a gradient of 0. Without any gradient,
    # DistributedDataParallel would wait forever.
    predicted = at_least_float32(pred_boxes)[layer, image, query_index]
    boxes = targets.boxes[target_index]
    distance = (predicted - boxes).abs().sum(dim=(1, 2))
    apart = (1 - elementwise_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(boxes))).sum(dim=1)
    terms = {"ce": focal / num_boxes, "bbox": distance / num_boxes, "giou": apart / num_boxes}
    return {f"loss_{term}{name}": values[i] for term, values in terms.items() for i, name in enumerate(names)}


def _region_losses(
    weights: LossWeights,
    targets: Targets,
    region_embeddings: Tensor,
    phrases: tuple[Tensor, Tensor, Tensor],
    target: Tensor,
    query: Tensor,
) -> Tensor:
    """Return the contrastive loss of each of K matched pairs; phrases is the output of `phrase_bank`."""
    features, phrase_mask, fingerprints = phrases
    image = targets.batch_index[target]
    return contrastive_loss(
        region_embeddings[image, query],
        features.flatten(0, 1),
        image * features.shape[1] + targets.class_labels[target],
        weights.contrastive_temperature,
        same_phrase=fingerprints.flatten()[:, None] == fingerprints.flatten(),
        phrase_mask=phrase_mask.flatten(),
    )


def phrase_bank(text_embeddings: Tensor, phrase_ids: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean feature of every phrase of the batch and a fingerprint of its text.

    Args:
        text_embeddings: (B, T, D) token features.
        phrase_ids: (B, T) number of the phrase that each token belongs to, -1 on special tokens and padding.
        input_ids: (B, T) tokens.

    Returns:
        (B, N, D) float32 features, (B, N) bool that is True on real phrases, and (B, N) int64 fingerprints that are
        equal for equal texts. N is an upper bound that depends only on T, so no values need to be read.
    """
    # A delimiter separates two phrases, so at most every second token starts one.
    ordinals = torch.arange((phrase_ids.shape[1] + 1) // 2, device=phrase_ids.device)
    members = phrase_ids[:, None, :] == ordinals[:, None]
    counts = members.sum(dim=-1)
    with torch.autocast(device_type=text_embeddings.device.type, enabled=False):
        features = at_least_float32(text_embeddings)
        means = members.to(features.dtype) @ features / counts.clamp(min=1)[..., None]
    # Each token is hashed with its place in the phrase, modulo a prime, and the hashes are added up. Integers give the
    # same sum on any device and in any order, and it stays below 2^63. Two in a billion texts collide, which only costs
    # one negative.
    prime = 2**31 - 1
    place = (members.cumsum(dim=-1) * members).sum(dim=1)
    key = (input_ids * 521 + place) % prime
    key = (key * 48271) % prime
    key = (key * key + input_ids) % prime
    key = (key * key + place) % prime
    return means, counts > 0, (members * key[:, None, :]).sum(dim=-1)
