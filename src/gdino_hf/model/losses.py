"""The training loss: focal over prompt tokens, L1 and GIoU of matched boxes, and a region-phrase contrastive term.

    loss = sum over the decoder's layers, the encoder's proposals and the denoising queries of
           class_loss_coefficient * focal + bbox_loss_coefficient * L1 + giou_loss_coefficient * (1 - GIoU)
         + contrastive_loss_coefficient * contrastive

Every term is a sum over the batch divided by the number of annotated boxes, so the loss of a batch is the mean of its
images' losses weighted by their numbers of boxes, on one device or on many. All of it is float32, also under autocast.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .box_ops import at_least_float32, cxcywh_to_xyxy, elementwise_giou
from .denoising import DenoisingQueries
from .matcher import hungarian_match
from .targets import Targets


class LossConfig(Protocol):
    """The fields of GDinoConfig that the loss reads."""

    class_cost: float
    bbox_cost: float
    giou_cost: float
    class_loss_coefficient: float
    bbox_loss_coefficient: float
    giou_loss_coefficient: float
    contrastive_loss_coefficient: float
    contrastive_temperature: float
    focal_alpha: float
    focal_gamma: float
    auxiliary_loss: bool


def sigmoid_focal_loss(
    logits: Tensor, targets: Tensor, mask: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Binary cross-entropy that fades out where the prediction is right already (Lin et al. 2017, equation 5).

    FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t), p_t the probability given to the truth, alpha_t `alpha` for positives
    and 1 - alpha for the rest.

    Args:
        logits: (..., T); may be -inf where the mask is False.
        targets: (..., T) bool, True where the token names the query's box.
        mask: broadcastable to (..., T), True where the token takes part.
        alpha: weight of positives.
        gamma: how fast well-classified tokens fade; 0 gives weighted cross-entropy.

    Returns:
        (..., T) losses, 0 where the mask is False; no gradient reaches those logits.
    """
    # -inf must be replaced before any arithmetic: its gradient is NaN even when the result is masked afterwards.
    logits = at_least_float32(logits).masked_fill(~mask, 0.0)
    # With the sign turned on positives, 1 - p_t is one sigmoid and -log(p_t) one softplus, exact far into both tails.
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
    """InfoNCE of each region over the phrases of the batch (van den Oord et al. 2018, equation 4; region to phrase).

    loss_r = -log( exp(s(r, p_r) / tau) / sum over phrases p of exp(s(r, p) / tau) ), s the cosine similarity and the
    sum over p_r and every phrase with another text: "cat" in a neighbour's prompt is no evidence against "cat" here.

    Args:
        region_embeddings: (R, D) features of matched queries.
        phrase_embeddings: (P, D) features of all phrases of the batch.
        targets: (R,) int64 phrase of each region.
        temperature: tau, above 0; small values punish only the nearest wrong phrases.
        same_phrase: (P, P) bool, True where two phrases have one text; none do if None.
        phrase_mask: (P,) bool, False on padding among the phrases; all are real if None.

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
    """Boxes of the whole job's batch, at least 1, per process.

    DistributedDataParallel averages gradients over W processes. Dividing each one's summed loss by (boxes of all) / W
    makes that average the gradient of one process that saw the whole batch. This is the only place that looks at W.

    Args:
        num_boxes: boxes of this process.
        device: where the communication happens.

    Returns:
        max(1, boxes of all processes) / W.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return float(max(num_boxes, 1))
    total = torch.tensor(float(num_boxes), device=device)
    torch.distributed.all_reduce(total)
    return total.clamp(min=1) / torch.distributed.get_world_size()


def detection_losses(
    config: LossConfig,
    targets: Targets,
    *,
    phrase_ids: Tensor,
    attention_mask: Tensor,
    decoder_logits: Tensor,
    decoder_boxes: Tensor,
    encoder_logits: Tensor | None = None,
    encoder_boxes: Tensor | None = None,
    denoising: DenoisingQueries | None = None,
    denoising_logits: Tensor | None = None,
    denoising_boxes: Tensor | None = None,
    region_embeddings: Tensor | None = None,
    text_embeddings: Tensor | None = None,
    input_ids: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Match the predictions with the annotated boxes and weigh all terms of the loss.

    Args:
        config: coefficients, matching costs and focal parameters.
        targets: the batch's annotated boxes.
        phrase_ids: (B, T) ordinal of the label each token belongs to, -1 on special tokens and padding.
        attention_mask: (B, T) nonzero on real tokens, special ones included: they are trained to stay silent.
        decoder_logits: (L, B, Q, T or more) of all decoder layers; tokens beyond the prompt are not looked at.
        decoder_boxes: (L, B, Q, 4) cxcywh in [0, 1].
        encoder_logits: (B, Q', T or more) of the encoder's proposals, matched on their own.
        encoder_boxes: (B, Q', 4) cxcywh in [0, 1].
        denoising: what the denoising queries stand for.
        denoising_logits: (L, B, P, T or more).
        denoising_boxes: (L, B, P, 4) cxcywh in [0, 1].
        region_embeddings: (B, Q, D) last decoder layer's hidden states, for the contrastive term.
        text_embeddings: (B, T, D) text features, for the contrastive term.
        input_ids: (B, T) tokens, which tell phrases of one text, for the contrastive term.

    Returns:
        The weighted sum, and the unweighted terms: loss_ce, loss_bbox and loss_giou of the last decoder layer; the
        same with _0, _1, ... of the layers before (only if `config.auxiliary_loss`), with _enc of the encoder's
        proposals, with _dn and _dn_0, ... of the denoising queries; loss_contrastive.

    Raises:
        ValueError: if predictions are not finite, or the contrastive term is asked for and its inputs are missing.
    """
    num_tokens = attention_mask.shape[1]
    text_mask = attention_mask > 0
    first = 0 if config.auxiliary_loss else decoder_logits.shape[0] - 1
    decoder_logits, decoder_boxes = decoder_logits[first:, ..., :num_tokens], decoder_boxes[first:]
    layer_logits, layer_boxes = list(decoder_logits), list(decoder_boxes)
    if encoder_logits is not None and encoder_boxes is not None:
        encoder_logits = encoder_logits[..., :num_tokens]
        layer_logits.append(encoder_logits)
        layer_boxes.append(encoder_boxes)
    matches = hungarian_match(
        layer_logits,
        layer_boxes,
        targets,
        text_mask,
        class_cost=config.class_cost,
        bbox_cost=config.bbox_cost,
        giou_cost=config.giou_cost,
        focal_alpha=config.focal_alpha,
        focal_gamma=config.focal_gamma,
    )
    num_boxes = average_num_boxes(targets.num_boxes, text_mask.device)

    num_layers = decoder_logits.shape[0]
    names = [f"_{layer}" for layer in range(num_layers - 1)] + [""]
    target_index = torch.stack([target for target, _ in matches[:num_layers]])
    query_index = torch.stack([query for _, query in matches[:num_layers]])
    token_mask = text_mask[:, None, :]
    loss_dict = _set_losses(
        config, targets, decoder_logits, decoder_boxes, target_index, query_index, token_mask, num_boxes, names
    )
    if encoder_logits is not None and encoder_boxes is not None:
        target, query = matches[-1]
        loss_dict |= _set_losses(
            config,
            targets,
            encoder_logits[None],
            encoder_boxes[None],
            target[None],
            query[None],
            token_mask,
            num_boxes,
            ["_enc"],
        )
    if denoising is not None and denoising_logits is not None and denoising_boxes is not None:
        loss_dict |= _set_losses(
            config,
            targets,
            denoising_logits[first:, ..., :num_tokens],
            denoising_boxes[first:],
            denoising.target_index.expand(num_layers, -1),
            denoising.query_index.expand(num_layers, -1),
            token_mask & denoising.real[:, :, None],
            num_boxes * denoising.num_groups,
            [f"_dn{name}" for name in names],
        )
    if config.contrastive_loss_coefficient:
        if region_embeddings is None or text_embeddings is None or input_ids is None:
            raise ValueError(
                "contrastive_loss_coefficient is not 0 but region_embeddings, text_embeddings or input_ids is missing; "
                "pass all three to detection_losses or set the coefficient to 0."
            )
        target, query = target_index[-1], query_index[-1]
        image = targets.batch_index[target]
        phrases, phrase_mask, fingerprints = phrase_bank(text_embeddings, phrase_ids, input_ids)
        each = contrastive_loss(
            region_embeddings[image, query],
            phrases.flatten(0, 1),
            image * phrases.shape[1] + targets.class_labels[target],
            config.contrastive_temperature,
            same_phrase=fingerprints.flatten()[:, None] == fingerprints.flatten(),
            phrase_mask=phrase_mask.flatten(),
        )
        loss_dict["loss_contrastive"] = each.sum() / num_boxes

    weights = {
        "ce": config.class_loss_coefficient,
        "bbox": config.bbox_loss_coefficient,
        "giou": config.giou_loss_coefficient,
        "contrastive": config.contrastive_loss_coefficient,
    }
    loss = torch.stack([weights[name.split("_")[1]] * value for name, value in loss_dict.items()]).sum()
    return loss, loss_dict


def _set_losses(
    config: LossConfig,
    targets: Targets,
    logits: Tensor,
    pred_boxes: Tensor,
    target_index: Tensor,
    query_index: Tensor,
    mask: Tensor,
    num_boxes: Tensor | float,
    names: list[str],
) -> dict[str, Tensor]:
    """Focal, L1 and GIoU of L layers (L, B, Q, T) and (L, B, Q, 4) whose matched pairs are given as (L, K)."""
    layer = torch.arange(logits.shape[0], device=logits.device)[:, None]
    image = targets.batch_index[target_index]
    tokens = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    tokens[layer, image, query_index] = targets.positive_maps[target_index]
    focal = sigmoid_focal_loss(logits, tokens, mask, config.focal_alpha, config.focal_gamma).sum(dim=(1, 2, 3))

    # With no box at all these are sums over nothing: zero, and yet a gradient of zero reaches every box head, without
    # which DistributedDataParallel would wait for it forever.
    predicted = at_least_float32(pred_boxes)[layer, image, query_index]
    boxes = targets.boxes[target_index]
    distance = (predicted - boxes).abs().sum(dim=(1, 2))
    apart = (1 - elementwise_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(boxes))).sum(dim=1)
    terms = {"ce": focal / num_boxes, "bbox": distance / num_boxes, "giou": apart / num_boxes}
    return {f"loss_{term}{name}": values[i] for term, values in terms.items() for i, name in enumerate(names)}


def phrase_bank(text_embeddings: Tensor, phrase_ids: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean feature of every phrase of the batch, and what tells its text.

    Args:
        text_embeddings: (B, T, D) token features.
        phrase_ids: (B, T) ordinal of the phrase each token belongs to, -1 on special tokens and padding.
        input_ids: (B, T) tokens.

    Returns:
        (B, N, D) float32 features, (B, N) bool that is True on real phrases, and (B, N) int64 fingerprints that are
        equal for equal texts. N is a bound that holds for every prompt of T tokens, so no value is looked at.
    """
    # Two phrases have a delimiter between them, so no more than every other token can start one.
    ordinals = torch.arange((phrase_ids.shape[1] + 1) // 2, device=phrase_ids.device)
    members = phrase_ids[:, None, :] == ordinals[:, None]
    counts = members.sum(dim=-1)
    with torch.autocast(device_type=text_embeddings.device.type, enabled=False):
        features = at_least_float32(text_embeddings)
        means = members.to(features.dtype) @ features / counts.clamp(min=1)[..., None]
    # Token and place in its phrase, scrambled modulo a prime and summed: integers, so equal on any device and in any
    # order of summation, and below 2^63. Two texts in a billion collide, at the price of one negative.
    prime = 2**31 - 1
    place = (members.cumsum(dim=-1) * members).sum(dim=1)
    key = (input_ids * 521 + place) % prime
    key = (key * 48271) % prime
    key = (key * key + input_ids) % prime
    key = (key * key + place) % prime
    return means, counts > 0, (members * key[:, None, :]).sum(dim=-1)
