"""Start a trunk with the closed-set teacher's scores and boxes, before any training.

The teacher's logits are linear in the features x of level l: z = W_l x + b_l. A class head of Grounding DINO computes
q . t / sqrt(D) + b from a query q and a text token t. If M maps logits to queries with q . t / sqrt(D) + b = z for the
tokens t of all names, the input projection M (W_l x + b_l - b) gives the teacher's scores. Four choices let them pass
through the layers in between almost unchanged:

- Group and layer normalization divide by a deviation that depends on the picture. A constant of +1, -1, +1, -1, ... is
  added to a signal that is twenty times smaller than logits; beside it, normalization is close to the identity.
- Group normalization subtracts the mean of each group of channels, and a signal along the constant changes the group's
  deviation. Two channels in four are free of both. They carry the directions in which the signal's mean varies most
  from picture to picture; the others carry the rest.
- A name may have several tokens. The text enhancer's self-attention starts as a mean over the phrase, so that the
  tokens of a name are alike. Text is projected on the principal components of a vocabulary; the vocabulary's other
  names must not get scores, which costs a little of the exactness.
- Residual branches start with an output of zero, and layers that read tokens subtract the constant first.

The means of groups are left for what the teacher's boxes need. `fit_boxes` then fits the proposals' box head to the
teacher's boxes, and every query starts with the box of its proposal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..model.box_ops import cxcywh_to_xyxy, elementwise_giou
from ..model.image_geometry import make_proposals
from ..model.modeling_gdino import GDinoForObjectDetection
from ..model.processing_gdino import GDinoProcessor
from .closed_set_teacher import RESIDUAL_OUTPUTS, ClosedSetHead

LOGITS = 20.0
"""How many times larger a logit is than its signal beside the constant."""
QUERY_OFFSET = 0.4
"""The constant's size in the decoder, whose layer normalization has to notice how strong a query is."""
_BOX_SIGNAL = 0.1
_INPUT = 1 / 3  # Layers that read tokens get signals of about this many logits.
_TEXT_RIDGE = 0.03
# Weights of what is fitted beside the scores of the names: short vectors, and no score for other names and separators.
_TOKEN_RIDGE, _OTHER_NAMES, _SEPARATORS = 1e-3, 4e-3, 0.03
_BIAS = -5.5  # About the teacher's mean logit, so that the background needs almost no signal.
_SMALLEST_SCORE = 0.04
_NAMES_PER_PROMPT = 40
_IMAGES_AT_ONCE = 16


def start_from_teacher(
    model: GDinoForObjectDetection,
    processor: GDinoProcessor,
    head: ClosedSetHead,
    rows: Any,
    names: Sequence[str],
    vocabulary: Sequence[str] = (),
    num_images: int = 560,
    box_steps: int = 6000,
) -> None:
    """Start a trunk with the teacher's scores and boxes.

    Args:
        model: Freshly initialized model with its pretrained parts, changed in place.
        processor: The model's processor, with a fixed size.
        head: The teacher.
        rows: Training data, of which images spread evenly are used.
        names: Names of the teacher's classes, in its order.
        vocabulary: Further names that the directions of text have to tell apart.
        num_images: Number of images that the box head is fitted on; the scores need an eighth of them.
        box_steps: Number of steps in which the box head is fitted.
    """
    chosen = range(0, len(rows), max(1, len(rows) // num_images))
    batches: list[tuple[Tensor, ...]] = []
    for start in range(0, len(chosen), _IMAGES_AT_ONCE):
        images = [rows[index]["image"].convert("RGB") for index in chosen[start : start + _IMAGES_AT_ONCE]]
        with torch.no_grad():
            batches.append(
                tuple(model.model.backbone(processor.image_processor(images, return_tensors="pt")["pixel_values"]))
            )
    some = [torch.cat([maps[level][::8] for maps in batches]) for level in range(head.num_levels)]
    start_with_scores(model, processor, head, some, names, vocabulary)
    fit_boxes(model, head, batches, box_steps)
    model.train()


@dataclass(frozen=True)
class Directions:
    """Orthonormal directions of a token of width D, whose channels are normalized in G groups.

    Attributes:
        offset: (D,) +1 and -1 in turn.
        signal: (D, F + G - 1). The first F are free: orthogonal to the constant and to the mean of each group.
        means: (D, G - 1) differences between the groups' means.
    """

    offset: Tensor
    signal: Tensor
    means: Tensor

    @classmethod
    def of_width(cls, width: int, groups: int) -> Directions:
        """Build the directions.

        Args:
            width: D.
            groups: G.

        Raises:
            ValueError: A group has fewer than four channels, or an odd number.
        """
        size = width // groups
        if size < 4 or size % 2:
            raise ValueError(
                f"A width of {width} in {groups} groups leaves {size} channels for each; the start needs an even "
                "number from four."
            )
        ones, turn = torch.ones(size, 1).double(), torch.tensor([1.0, -1.0]).double().repeat(size // 2)[:, None]
        inner = torch.linalg.qr(torch.cat((ones, turn, torch.eye(size).double()[:, : size - 2]), dim=1))[0].contiguous()
        between = torch.linalg.qr(torch.cat((torch.ones(groups, 1), torch.eye(groups)[:, :-1]), dim=1).double())[
            0
        ].contiguous()
        free = torch.kron(torch.eye(groups).double(), inner[:, 2:].contiguous())
        along, means = (torch.kron(between[:, 1:].contiguous(), inner[:, [place]].contiguous()) for place in (1, 0))
        return cls(turn[:, 0].repeat(groups), torch.cat((free, along), dim=1), means)


@torch.no_grad()
def start_with_scores(
    model: GDinoForObjectDetection,
    processor: GDinoProcessor,
    head: ClosedSetHead,
    maps: Sequence[Tensor],
    names: Sequence[str],
    vocabulary: Sequence[str] = (),
) -> None:
    """Initialize a trunk so that its class heads give the teacher's scores.

    Args:
        model: Freshly initialized model whose class_head is "scaled_bias", with its pretrained parts; changed in place.
        processor: The model's processor.
        head: The teacher.
        maps: One map (B, C, h, w) per level of the backbone, of some photographs, for the statistics.
        names: Names of the teacher's classes, in its order.
        vocabulary: Further names that the directions of text have to tell apart.

    Raises:
        ValueError: The names do not fit in one prompt, or a group of channels is too small.
    """
    width = model.config.d_model
    directions = Directions.of_width(width, cast(Any, model.model.input_proj_vision)[0][1].num_groups)
    model.eval()
    for class_head in (model.model.encoder_output_class_embed, *model.class_embed):
        cast(Any, class_head).bias.fill_(_BIAS)
    for name, parameter in model.model.named_parameters():
        if name.startswith(("encoder.", "decoder.")) and name.endswith(
            (*RESIDUAL_OUTPUTS, "vision_param", "text_param")
        ):
            parameter.zero_()
    for layer in cast(Any, model.model.encoder.layers):
        _average_phrases(layer.text_enhancer_layer.self_attn)
    others = [name for name in vocabulary if name not in names]
    components = _text_components(model, processor, [*names, *others])

    _set_text_projection(model, directions.signal, components)
    levels = [_Level.of(head, level, maps[level]) for level in range(head.num_levels)]
    solution = _solve(model, processor, directions.signal, names, others)
    # Turn the text so that the signal's mean varies from picture to picture in free directions.
    varying = torch.cat([_deviations(solution, level, len(maps[0])) for level in levels], dim=1)
    turned = directions.signal @ torch.linalg.eigh(varying @ varying.T)[1].flip(1).T
    _set_text_projection(model, turned, components)
    solution = _solve(model, processor, turned, names, others)

    squares = []
    for place, (projection, norm) in enumerate(cast(Any, model.model.input_proj_vision)):
        # Levels beyond the backbone's are computed from its last one.
        level = levels[min(place, len(levels) - 1)]
        signal, mean = solution @ (level.logits() - _BIAS), level.features.mean(dim=1)
        box = level.box_directions(directions.means.shape[1])
        weight = turned @ solution @ level.classes + _BOX_SIGNAL * directions.means[:, : len(box)] @ box
        _set_image_projection(projection, weight, directions.offset - weight @ mean)
        # Group normalization takes some of the mean away, so the projection gives none and the bias all of it.
        norm.weight.fill_(1.0)
        norm.bias.copy_(turned @ signal.mean(dim=1))
        squares.append(signal.square().sum(dim=0).mean().item() / width)
    _read_signals(model, directions.offset.float(), sum(squares[: len(levels)]) / len(levels))


@torch.no_grad()
def _average_phrases(attention: Any) -> None:
    """Make a text self-attention add about the phrase's mean."""
    for part in (attention.query, attention.key):
        part.weight.mul_(0.1)
    attention.value.weight.copy_(torch.eye(len(attention.value.weight)))
    attention.out_proj.weight.copy_(torch.eye(len(attention.out_proj.weight)))


@dataclass(frozen=True)
class _TextComponents:
    """Mean (H,) of a vocabulary's tokens and the map (R, H) to their principal components, nearly whitened."""

    mean: Tensor
    matrix: Tensor


def _text_components(
    model: GDinoForObjectDetection, processor: GDinoProcessor, names: Sequence[str]
) -> _TextComponents:
    """Compute the principal components of the tokens of names and of the separators between them."""
    tokens, separators = [], []
    for start in range(0, len(names), _NAMES_PER_PROMPT):
        hidden: list[Tensor] = []
        projection = model.model.text_projection
        hook = projection.register_forward_pre_hook(lambda module, inputs, hidden=hidden: hidden.append(inputs[0]))
        inputs = _prompt(processor, names[start : start + _NAMES_PER_PROMPT])
        text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        hook.remove()
        named = text.phrase_ids >= 0
        tokens.append(hidden[0][named].double())
        separators.append(hidden[0][~named & (inputs["attention_mask"] > 0)].double())
    mean = torch.cat(tokens).mean(dim=0)
    variance, axes = torch.linalg.eigh(torch.cov((torch.cat((*tokens, *separators)) - mean).T))
    variance, axes = variance.flip(0), axes.flip(1)
    return _TextComponents(mean, (axes / (variance.clamp(min=0) + _TEXT_RIDGE * variance.mean()).sqrt()).T)


def _prompt(processor: GDinoProcessor, names: Sequence[str]) -> Any:
    inputs = processor(images=[Image.new("RGB", (32, 32))], text=list(names))
    if len(inputs["input_ids"]) > 1:
        raise ValueError(f"{len(names)} names do not fit in one prompt; raise max_text_len.")
    return inputs


def _set_text_projection(model: GDinoForObjectDetection, signal: Tensor, components: _TextComponents) -> None:
    number = min(signal.shape[1], len(components.matrix))
    weight = signal[:, :number] @ components.matrix[:number]
    model.model.text_projection.weight.copy_(weight)
    model.model.text_projection.bias.copy_(-weight @ components.mean)


@dataclass(frozen=True)
class _Level:
    """One level of the teacher with features of some photographs; float64.

    Attributes:
        classes: (C, K) weights of the K channels for C classes.
        class_bias: (C,)
        boxes: (4 R, K) weights for the distances of the four sides.
        features: (K, S) features of all cells.
    """

    classes: Tensor
    class_bias: Tensor
    boxes: Tensor
    features: Tensor

    @classmethod
    def of(cls, head: ClosedSetHead, level: int, maps: Tensor) -> _Level:
        weight, bias = (x.double() for x in head.layer(level))
        features = maps[:, -weight.shape[1] :].transpose(0, 1).flatten(1).double()
        number = head.num_classes
        return cls(weight[:number], bias[:number], weight[number:], features)

    def logits(self) -> Tensor:
        """Return the teacher's logits (C, S)."""
        return self.classes @ self.features + self.class_bias[:, None]

    def box_directions(self, most: int) -> Tensor:
        """Return maps of unit variance (N, K) to what the boxes need and the classes do not hold, at most `most`."""
        rest = torch.linalg.svd(self.classes)[2][len(self.classes) :]
        if not len(rest):
            return rest
        variance, axes = torch.linalg.eigh(torch.cov(rest @ self.features).reshape(len(rest), len(rest)))
        deviation = variance.clamp(min=1e-4 * variance.max()).sqrt()
        whitened = (axes / deviation).T @ rest
        needed = torch.linalg.svd(self.boxes @ rest.T @ (axes * deviation))[2]
        return needed[:most] @ whitened


def _deviations(solution: Tensor, level: _Level, pictures: int) -> Tensor:
    """Return how far each photograph's mean signal lies from that of all, (N, B)."""
    means = (solution @ (level.logits() - _BIAS)).unflatten(1, (pictures, -1)).mean(dim=-1)
    return means - means.mean(dim=1, keepdim=True)


def _solve(
    model: GDinoForObjectDetection,
    processor: GDinoProcessor,
    signal: Tensor,
    names: Sequence[str],
    others: Sequence[str],
) -> Tensor:
    """Return the map (N, C) from logits z above b to N signal directions.

    It is the ridge regression of q . t / sqrt(D) = z - b for the names' tokens t. Tokens of other names and separators
    count as well, with a logit of b whatever the picture shows.
    """
    tokens, phrases, separators = _text_states(model, processor, names, signal)
    quiet = _SEPARATORS * separators.T @ separators
    for start in range(0, len(others), _NAMES_PER_PROMPT):
        other, _, _ = _text_states(model, processor, others[start : start + _NAMES_PER_PROMPT], signal)
        quiet += _OTHER_NAMES * other.T @ other
    ridge = _TOKEN_RIDGE * model.config.d_model * torch.eye(len(quiet)).double()
    of_name = F.one_hot(phrases, len(names)).double()
    matrix = torch.linalg.solve(tokens.T @ tokens + quiet + ridge, tokens.T @ of_name)
    return matrix * math.sqrt(model.config.d_model) / LOGITS


def _text_states(
    model: GDinoForObjectDetection, processor: GDinoProcessor, names: Sequence[str], signal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the names' tokens (T, N) behind the encoder, the name of each (T,), and the separators (S, N)."""
    inputs = _prompt(processor, names)
    real = inputs["attention_mask"][0] > 0
    phrases = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).phrase_ids[0]
    states = model(**inputs).encoder_last_hidden_state_text[0].double() @ signal
    named = phrases >= 0
    return states[named], phrases[named], states[real & ~named]


def _set_image_projection(convolution: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    """Make a level's input projection linear in the last channels of the cell at the centre of its window."""
    centre = convolution.kernel_size[0] // 2
    convolution.weight.zero_()
    convolution.weight[:, -weight.shape[1] :, centre, centre] = weight.float()
    cast(Tensor, convolution.bias).copy_(bias)


def _read_signals(model: GDinoForObjectDetection, offset: Tensor, square: float) -> None:
    """Scale what the class heads read to logits, and let every layer that reads tokens subtract the constant.

    Args:
        model: The model.
        offset: (D,) the constant.
        square: Mean square of the signal beside it, per channel.
    """
    part = cast(Any, model.model)
    token = math.sqrt(1 + square)
    # The best proposals become queries; their signal is stronger than the mean.
    query = math.sqrt(QUERY_OFFSET**2 + 2 * square)
    part.enc_output.weight.copy_(torch.eye(len(offset)))
    part.enc_output.bias.zero_()
    part.enc_output_norm.weight.fill_(LOGITS * token)
    part.enc_output_norm.bias.copy_((QUERY_OFFSET - 1) * LOGITS * offset)
    part.decoder.layer_norm.weight.fill_(LOGITS * query)
    from_token, from_query, of_proposals = LOGITS * _INPUT / token, LOGITS * _INPUT * query, QUERY_OFFSET * LOGITS
    for layer in part.encoder.layers:
        fusion, image = layer.fusion_layer.attn, layer.deformable_layer
        for linear in (fusion.vision_proj, fusion.values_vision_proj, image.self_attn.value_proj, image.fc1):
            _subtract(linear, from_token, offset)
    for number, layer in enumerate(part.decoder.layers):
        own = layer.self_attn
        for linear in (own.query, own.key, own.value):
            if number:
                _subtract(linear, from_query, QUERY_OFFSET / query * offset)
            else:
                _subtract(linear, _INPUT, of_proposals * offset)
        for linear in (layer.encoder_attn_text.query, layer.fc1):
            _subtract(linear, from_query, QUERY_OFFSET / query * offset)
        _subtract(layer.encoder_attn.value_proj, from_token, offset)
    proposals = part.encoder_output_bbox_embed.layers
    _subtract(proposals[0], _INPUT, of_proposals * offset)
    for boxes in model.bbox_embed:
        layers = cast(Any, boxes).layers
        if layers[-1] is not proposals[-1]:
            _subtract(layers[0], _INPUT, of_proposals * offset)
            layers[-1].weight.zero_()
            layers[-1].bias.zero_()


def _subtract(linear: nn.Linear, scale: float, offset: Tensor) -> None:
    """Turn W x + b into W scale (x - offset) + b."""
    linear.bias.sub_(scale * (linear.weight @ offset))
    linear.weight.mul_(scale)


def fit_boxes(
    model: GDinoForObjectDetection,
    head: ClosedSetHead,
    batches: Sequence[Sequence[Tensor]],
    steps: int,
    tell: Callable[[str], Any] = print,
) -> None:
    """Fit the proposals' box head to the teacher's boxes, at cells in which the teacher sees something.

    Args:
        model: Model after `start_with_scores`, changed in place.
        head: The teacher.
        batches: Maps (B, C, h, w) of every level of the backbone, batch by batch.
        steps: Number of steps of 1,024 cells.
        tell: Function that is called with a line at the end.
    """
    tokens, anchors, boxes, scores = (
        torch.cat(parts) for parts in zip(*(_cells(model, head, maps) for maps in batches), strict=True)
    )
    proposals = model.model.encoder_output_bbox_embed
    optimizer = torch.optim.Adam(proposals.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    overlap = torch.zeros(1)
    for _ in range(steps):
        chosen = torch.randint(0, len(tokens), (1024,))
        predicted = (proposals(tokens[chosen]) + anchors[chosen]).sigmoid()
        overlap = elementwise_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(boxes[chosen]))
        weights = scores[chosen] + 0.1
        terms = 1 - overlap + 5 * (predicted - boxes[chosen]).abs().sum(dim=-1)
        optimizer.zero_grad()
        ((terms * weights).sum() / weights.sum()).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    tell(f"proposals start with a GIoU of {overlap.mean().item():.2f} with the teacher's boxes")


@torch.no_grad()
def _cells(
    model: GDinoForObjectDetection, head: ClosedSetHead, maps: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens (N, D), proposals before the sigmoid (N, 4), the teacher's boxes (N, 4) and its scores (N,)."""
    scores, boxes = head(maps)
    best = scores.amax(dim=-1)
    tokens = []
    for place, projection in enumerate(cast(Any, model.model.input_proj_vision)):
        tokens.append(projection(maps[min(place, len(maps) - 1)]))
    shapes = [tuple(each.shape[-2:]) for each in tokens]
    if len(tokens) > len(maps):
        # The extra level sees every other cell of the last.
        height, width = maps[-1].shape[-2:]
        cells = torch.arange(height * width).view(height, width)[::2, ::2].flatten() + best.shape[1] - height * width
        best, boxes = torch.cat((best, best[:, cells]), dim=1), torch.cat((boxes, boxes[:, cells]), dim=1)
    masks = [torch.ones(len(best), *shape, dtype=torch.bool) for shape in shapes]
    anchors, valid = make_proposals(shapes, torch.ones_like(best, dtype=torch.bool), masks)
    # The encoder's branches are still zero, so its layers only normalize.
    flat = torch.cat([each.flatten(2).transpose(1, 2) for each in tokens], dim=1)
    features = model.model.enc_output_norm(F.layer_norm(flat, flat.shape[-1:]))
    seen = (best > _SMALLEST_SCORE) & valid
    return features[seen], anchors[seen], boxes[seen], best[seen]
