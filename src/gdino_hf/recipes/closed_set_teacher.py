"""The closed-set head that gdino-nano's image backbone was trained with, as a teacher for the encoder.

The backbone comes from a closed-set detector trained on 118k photographs, which knows its 80 names better than the
2.8k photographs of the recipe can teach them. The detector's head is one linear layer on features that the frozen
backbone computes anyway: class scores, and a distribution over distances for each side of a box (Li et al. 2020,
arXiv:2006.04388, equations 3 to 6). It is used twice:

- `dense_loss`: every image token of the encoder learns the teacher's score for every label of the prompt and, where
  the teacher detects something, its box (knowledge distillation, Hinton et al. 2015, with the quality focal loss of Li
  et al.).
- `start_from_classifier`: image and text projections are initialized so that their product approximates the teacher's
  class logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from ..model.box_ops import cxcywh_to_xyxy, elementwise_giou, xyxy_to_cxcywh
from ..model.modeling_gdino import GDinoForObjectDetection
from ..model.outputs_gdino import GDinoTextFeatures

DETECTOR_FILE = "detector.safetensors"
# Cells with a lower score lie on background, so their boxes are no training targets.
MIN_SCORE = 0.05
# The last matrix of each residual branch in encoder and decoder.
RESIDUAL_OUTPUTS = ("out_proj.weight", "output_proj.weight", "fc2.weight")


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Return whether two modules have the same weights, but for rounding to float16."""
    own, other = first.state_dict(), second.state_dict()
    return own.keys() == other.keys() and all(
        own[name].shape == other[name].shape
        and torch.allclose(own[name].float(), other[name].float(), rtol=2e-3, atol=1e-5)
        for name in own
    )


class ClosedSetHead(nn.Module):
    """Class scores and boxes at every cell of the feature pyramid; its weights are buffers and never trained.

    Args:
        layers: Weight (C + 4 R, D) and bias (C + 4 R) of each level, fine to coarse. They map D head features to the
            logits of C classes, then of R distances for each of left, top, right and bottom.
        num_classes: Number of classes C.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_levels = len(layers)
        for level, (weight, bias) in enumerate(layers):
            self.register_buffer(f"weight{level}", weight)
            self.register_buffer(f"bias{level}", bias)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ClosedSetHead:
        """Read the head from the image backbone's folder, where `nanodet_backbone --head-features` wrote it.

        Args:
            folder: Folder of the image backbone.

        Raises:
            FileNotFoundError: The folder has no head.
        """
        path = Path(folder) / DETECTOR_FILE
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing; write the backbone with gdino_hf.recipes.nanodet_backbone and --head-features."
            )
        with safe_open(path, framework="pt") as file:
            num_classes = int(file.metadata()["num_classes"])
            levels = sorted({key.split(".")[0] for key in file.keys()})  # noqa: SIM118
            layers = [(file.get_tensor(f"{level}.weight"), file.get_tensor(f"{level}.bias")) for level in levels]
        return cls(layers, num_classes)

    def layer(self, level: int) -> tuple[Tensor, Tensor]:
        """Return the weight (C + 4 R, D) and the bias (C + 4 R) of a level."""
        return self.get_buffer(f"weight{level}"), self.get_buffer(f"bias{level}")

    def of_classes(self, classes: Sequence[int]) -> ClosedSetHead:
        """Return a head that knows some of this one's classes only.

        Args:
            classes: Indices of the classes, in the new head's order.
        """
        rows = [*classes, *range(self.num_classes, len(self.layer(0)[1]))]
        layers = [self.layer(level) for level in range(self.num_levels)]
        return ClosedSetHead([(weight[rows], bias[rows]) for weight, bias in layers], len(classes))

    @torch.no_grad()
    def forward(self, feature_maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute class scores and boxes at every cell.

        Args:
            feature_maps: One map (B, >= D, h, w) per level, fine to coarse; the last D channels are the head features.

        Returns:
            Scores (B, S, C) in [0, 1] and boxes (B, S, 4) cxcywh in [0, 1], for the cells of all levels, row by row.
        """
        scores, boxes = [], []
        for level, features in enumerate(feature_maps[: self.num_levels]):
            weight, bias = self.layer(level)
            height, width = features.shape[-2:]
            cells = features[:, -weight.shape[1] :].flatten(2).transpose(1, 2)
            output = F.linear(cells, weight, bias)
            scores.append(output[..., : self.num_classes].sigmoid())
            distances = output[..., self.num_classes :].unflatten(-1, (4, -1)).softmax(-1)
            distances = distances @ torch.arange(distances.shape[-1], dtype=output.dtype, device=output.device)
            y, x = torch.meshgrid(
                torch.arange(height, device=output.device) + 0.5,
                torch.arange(width, device=output.device) + 0.5,
                indexing="ij",
            )
            centers = torch.stack((x, y), dim=-1).flatten(0, 1)
            corners = torch.cat((centers - distances[..., :2], centers + distances[..., 2:]), dim=-1)
            corners = corners / corners.new_tensor([width, height, width, height])
            boxes.append(xyxy_to_cxcywh(corners.clamp(0, 1)))
        return torch.cat(scores, dim=1), torch.cat(boxes, dim=1)


@dataclass(frozen=True)
class DenseLoss:
    """Class, L1 and GIoU terms: sums over the batch divided by the teacher's total score."""

    ce: Tensor
    bbox: Tensor
    giou: Tensor


def dense_loss(
    logits: Tensor,
    boxes: Tensor,
    teacher_scores: Tensor,
    teacher_boxes: Tensor,
    phrase_classes: Tensor,
    phrase_ids: Tensor,
    attention_mask: Tensor,
) -> DenseLoss:
    """Compare the encoder's proposals with the teacher's scores and boxes.

    The class term is |y - p|^2 BCE(p, y) for each cell and token, where y is the teacher's score for the token's label,
    and 0 on special tokens (Li et al. 2020, equation 2). Box terms are weighted by the cell's highest y.

    Args:
        logits: (B, S', >= T) token logits of all cells; the teacher's S cells come first.
        boxes: (B, S', 4) cxcywh in [0, 1], the proposals' boxes.
        teacher_scores: (B, S, C) in [0, 1].
        teacher_boxes: (B, S, 4) cxcywh in [0, 1].
        phrase_classes: (B, N) int64 class of each label of the prompt, -1 for a label the teacher does not know.
        phrase_ids: (B, T) index of the label that each token belongs to, -1 on special tokens and padding.
        attention_mask: (B, T) nonzero on real tokens.

    Returns:
        The three terms.
    """
    num_cells, num_tokens = teacher_scores.shape[1], phrase_ids.shape[1]
    classes = phrase_classes.gather(1, phrase_ids.clamp(min=0))
    known = (classes >= 0) & (phrase_ids >= 0)
    targets = teacher_scores.gather(2, classes.clamp(min=0)[:, None].expand(-1, num_cells, -1)) * known[:, None]
    # Labels that the teacher does not know are left out of the loss; special tokens are trained towards 0.
    taught = (attention_mask > 0) & (known | (phrase_ids < 0))
    logits = logits[:, :num_cells, :num_tokens].float().masked_fill(~taught[:, None], 0.0)
    focus = (logits.detach().sigmoid() - targets) ** 2
    class_terms = focus * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    weights = targets.amax(-1)
    total = weights.sum().clamp(min=1)
    image, cell = (weights > MIN_SCORE).nonzero(as_tuple=True)
    predicted, target, weight = boxes[image, cell].float(), teacher_boxes[image, cell], weights[image, cell]
    overlap = elementwise_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target))
    return DenseLoss(
        ce=(class_terms * taught[:, None]).sum() / total,
        bbox=((predicted - target).abs().sum(-1) * weight).sum() / total,
        giou=((1 - overlap) * weight).sum() / total,
    )


@torch.no_grad()
def start_from_classifier(
    model: GDinoForObjectDetection,
    head: ClosedSetHead,
    feature_maps: Sequence[Tensor],
    text: GDinoTextFeatures,
    text_hidden: Tensor,
    ridge: float = 0.1,
) -> None:
    """Initialize the projections so that the product of image token and text token approximates the class logit.

    The image projections whiten each level's head features and rotate the levels onto each other. The text projection
    is a ridge regression from the text encoder's tokens to the class weights in those coordinates. The residual
    branches of encoder and decoder are scaled down, so that the projections' product reaches the class heads.

    Args:
        model: Freshly initialized model, changed in place.
        head: The teacher.
        feature_maps: One map (B, C, h, w) per level, of some photographs, for the statistics.
        text: Features of one prompt (1, T) that holds the teacher's names in the teacher's order.
        text_hidden: (1, T, H) output of the text encoder for that prompt, before the projection.
        ridge: Strength of the regularization, relative to the mean square of the inputs.
    """
    levels = _whitened_levels(head, feature_maps)
    for level, projection in enumerate(model.model.input_proj_vision):
        # Levels beyond the backbone's are computed from its last one.
        _set_image_projection(cast(nn.Sequential, projection), levels[min(level, len(levels) - 1)])

    directions = torch.stack([level.classes for level in levels]).mean(dim=0)
    directions = F.normalize(directions, dim=-1) * directions.shape[1] ** 0.5
    _set_text_projection(model, directions, text, text_hidden, ridge)

    model.model.enc_output.weight.copy_(torch.eye(model.config.d_model))
    for name, parameter in model.model.named_parameters():
        if name.startswith(("encoder.", "decoder.")) and name.endswith(RESIDUAL_OUTPUTS):
            parameter.mul_(0.1)


@dataclass(frozen=True)
class _WhitenedLevel:
    """One level's head features in coordinates that all levels share; float64.

    Attributes:
        matrix: (D, D) map from head features to the shared coordinates.
        mean: (D,) mean of the features in the shared coordinates.
        classes: (C, D) centred class weights in the shared coordinates.
    """

    matrix: Tensor
    mean: Tensor
    classes: Tensor


def _whitened_levels(head: ClosedSetHead, feature_maps: Sequence[Tensor]) -> list[_WhitenedLevel]:
    """Whiten each level's features, then rotate its class weights onto those of the first level."""
    levels: list[_WhitenedLevel] = []
    for level in range(head.num_levels):
        weight, _ = head.layer(level)
        cells = feature_maps[level][:, -weight.shape[1] :].transpose(0, 1).flatten(1).double()
        variance, axes = torch.linalg.eigh(torch.cov(cells))
        scale = variance.clamp(min=1e-4 * variance.max()).sqrt()
        matrix = axes / scale @ axes.T
        # Logits stay the same: w . x = (S w) . (S^-1 x), where S is the square root of the covariance.
        classes = weight[: head.num_classes].double() @ (axes * scale @ axes.T)
        classes = classes - classes.mean(dim=0)
        if levels:
            # Orthogonal Procrustes: the rotation that brings this level's class weights closest to the first level's.
            left, _, right = torch.linalg.svd(classes.T @ levels[0].classes)
            rotation = left @ right
            classes, matrix = classes @ rotation, rotation.T @ matrix
        levels.append(_WhitenedLevel(matrix, matrix @ cells.mean(dim=1), classes))
    return levels


def _set_image_projection(projection: nn.Sequential, level: _WhitenedLevel) -> None:
    """Make a level's input projection compute the whitened head features."""
    convolution = cast(nn.Conv2d, projection[0])
    size, used = min(convolution.out_channels, len(level.matrix)), level.matrix.shape[1]
    # The extra level's 3x3 convolution reads the features at the centre of its window.
    centre = convolution.kernel_size[0] // 2
    convolution.weight[:size] = 0.0
    convolution.weight[:size, -used:, centre, centre] = level.matrix[:size].float()
    cast(Tensor, convolution.bias)[:size] = -level.mean[:size].float()


def _set_text_projection(
    model: GDinoForObjectDetection, directions: Tensor, text: GDinoTextFeatures, text_hidden: Tensor, ridge: float
) -> None:
    """Fit the text projection so that it maps each name's tokens to the class's direction (C, D)."""
    real = text.phrase_ids[0] >= 0
    inputs = text_hidden[0, real].double()
    inputs = torch.cat((inputs, torch.ones_like(inputs[:, :1])), dim=1)
    targets = directions[text.phrase_ids[0, real]]
    gram = inputs.T @ inputs
    gram += ridge * inputs.square().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram, inputs.T @ targets).T.float()
    size = min(model.config.d_model, len(solution))
    model.model.text_projection.weight[:size] = solution[:size, :-1]
    model.model.text_projection.bias[:size] = solution[:size, -1]
