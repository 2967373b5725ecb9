"""The closed-set head that gdino-nano's image backbone was trained with, as the teacher of a language-guided encoder.

A closed-set detector that saw 118k photographs knows its names better than 2.8k photographs can tell. Its head is one
linear layer on the features that the frozen backbone computes anyway: class scores, and for each side of a box a
distribution over distances (Li et al. 2020, arXiv:2006.04388, equations 3 to 6). Two uses:

- `dense_loss`: every image token of the encoder learns the teacher's score for every label of the prompt and, where
  the teacher sees something, its box (knowledge distillation, Hinton et al. 2015, with Li et al.'s quality focal loss).
- `start_from_classifier`: image and text projections start so that their product is about the teacher's class logit.
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
# Below this score the teacher's box is a guess about background.
LEAST_SCORE = 0.05
# The last matrix of each residual branch in encoder and decoder.
RESIDUAL_OUTPUTS = ("out_proj.weight", "output_proj.weight", "fc2.weight")


class ClosedSetHead(nn.Module):
    """Class scores and boxes at every cell of the pyramid, never trained.

    Args:
        layers: Per level, fine to coarse, weight (C + 4 R, D) and bias (C + 4 R) on the level's head features: C
            classes, then R distances for the left, top, right and bottom side.
        num_classes: C.
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
        """Read what `conversion/convert_nanodet.py --head-features` wrote beside the backbone.

        Args:
            folder: The image backbone's folder.

        Raises:
            FileNotFoundError: The folder has no detector.
        """
        path = Path(folder) / DETECTOR_FILE
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing; write the backbone with conversion/convert_nanodet.py --head-features."
            )
        with safe_open(path, framework="pt") as file:
            num_classes = int(file.metadata()["num_classes"])
            levels = sorted({key.split(".")[0] for key in file.keys()})  # noqa: SIM118
            layers = [(file.get_tensor(f"{level}.weight"), file.get_tensor(f"{level}.bias")) for level in levels]
        return cls(layers, num_classes)

    def layer(self, level: int) -> tuple[Tensor, Tensor]:
        """Weight (C + 4 R, D) and bias of one level."""
        return self.get_buffer(f"weight{level}"), self.get_buffer(f"bias{level}")

    @torch.no_grad()
    def forward(self, feature_maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Detect at every cell.

        Args:
            feature_maps: Per level (B, >= D, h, w); the last D channels are the head features.

        Returns:
            Scores (B, S, C) in 0..1 and boxes (B, S, 4) cxcywh in units of the image, cells in rows, fine to coarse.
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
    """Sums over the batch divided by the teacher's total score: class, L1 and GIoU terms."""

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
    """What the encoder's proposals lack of the teacher's.

    Class term: |y - p|^2 BCE(p, y) for each cell and token, y the teacher's score for the token's label, 0 on special
    tokens (Li et al. 2020, equation 2). Box terms: weighted by the cell's best y.

    Args:
        logits: (B, S', >= T) token logits of all cells; the teacher's S cells come first.
        boxes: (B, S', 4) cxcywh in [0, 1].
        teacher_scores: (B, S, C).
        teacher_boxes: (B, S, 4) cxcywh in [0, 1].
        phrase_classes: (B, N) int64 class of each label of the prompt, -1 for a label the teacher does not know.
        phrase_ids: (B, T) ordinal of the label each token belongs to, -1 on special tokens and padding.
        attention_mask: (B, T) nonzero on real tokens.

    Returns:
        The three terms.
    """
    num_cells, num_tokens = teacher_scores.shape[1], phrase_ids.shape[1]
    classes = phrase_classes.gather(1, phrase_ids.clamp(min=0))
    known = (classes >= 0) & (phrase_ids >= 0)
    targets = teacher_scores.gather(2, classes.clamp(min=0)[:, None].expand(-1, num_cells, -1)) * known[:, None]
    # A label the teacher does not know is no evidence either way; special tokens are trained to stay silent.
    taught = (attention_mask > 0) & (known | (phrase_ids < 0))
    logits = logits[:, :num_cells, :num_tokens].float().masked_fill(~taught[:, None], 0.0)
    apart = (logits.detach().sigmoid() - targets) ** 2
    each = apart * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    weights = targets.amax(-1)
    total = weights.sum().clamp(min=1)
    image, cell = (weights > LEAST_SCORE).nonzero(as_tuple=True)
    predicted, wanted, weight = boxes[image, cell].float(), teacher_boxes[image, cell], weights[image, cell]
    overlap = elementwise_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
    return DenseLoss(
        ce=(each * taught[:, None]).sum() / total,
        bbox=((predicted - wanted).abs().sum(-1) * weight).sum() / total,
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
    """Start the projections so that image token times text token is about the teacher's class logit.

    Each level's head features are whitened, which turns its class weights with it; the levels' weights are then rotated
    onto each other (orthogonal Procrustes) and averaged, and the text projection is the ridge regression from the text
    encoder's tokens to them. Branches of the residual layers start small, so that what the projections say reaches the
    class heads.

    Args:
        model: Fresh from its initialization.
        head: The teacher.
        feature_maps: Per level (B, C, h, w) of some photographs, for the statistics.
        text: Features of one prompt (1, T) with the teacher's names in the teacher's order.
        text_hidden: (1, T, H) the text encoder's own output for it.
        ridge: Strength of the regression's regularizer, relative to the mean square of the inputs.
    """
    projections = model.model.input_proj_vision
    rows: list[tuple[Tensor, Tensor]] = []
    turned: list[Tensor] = []
    for level in range(head.num_levels):
        weight, _ = head.layer(level)
        cells = feature_maps[level][:, -weight.shape[1] :].transpose(0, 1).flatten(1).double()
        mean = cells.mean(dim=1)
        variance, axes = torch.linalg.eigh(torch.cov(cells))
        scale = variance.clamp(min=1e-4 * variance.max()).sqrt()
        whiten = axes / scale @ axes.T
        # w . x = (S w) . (S^-1 x) with S the square root of the covariance.
        classes = weight[: head.num_classes].double() @ (axes * scale @ axes.T)
        classes = classes - classes.mean(dim=0)
        if turned:
            left, _, right = torch.linalg.svd(classes.T @ turned[0])
            classes, whiten = classes @ (left @ right), (left @ right).T @ whiten
        turned.append(classes)
        rows.append((whiten, whiten @ mean))
    directions = torch.stack(turned).mean(dim=0)
    directions = F.normalize(directions, dim=-1) * directions.shape[1] ** 0.5

    for level, projection in enumerate(projections):
        whiten, offset = rows[min(level, head.num_levels - 1)]
        convolution = cast(nn.Conv2d, cast(nn.Sequential, projection)[0])
        size, used = min(convolution.out_channels, len(whiten)), whiten.shape[1]
        # Levels beyond the backbone's read the last one through the middle of their window.
        middle = convolution.kernel_size[0] // 2
        convolution.weight[:size] = 0.0
        convolution.weight[:size, -used:, middle, middle] = whiten[:size].float()
        cast(Tensor, convolution.bias)[:size] = -offset[:size].float()

    real = text.phrase_ids[0] >= 0
    inputs = text_hidden[0, real].double()
    inputs = torch.cat((inputs, torch.ones_like(inputs[:, :1])), dim=1)
    wanted = directions[text.phrase_ids[0, real]]
    gram = inputs.T @ inputs
    gram += ridge * inputs.square().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram, inputs.T @ wanted).T.float()
    size = min(model.config.d_model, len(solution))
    model.model.text_projection.weight[:size] = solution[:size, :-1]
    model.model.text_projection.bias[:size] = solution[:size, -1]

    model.model.enc_output.weight.copy_(torch.eye(model.config.d_model))
    for name, parameter in model.model.named_parameters():
        if name.startswith(("encoder.", "decoder.")) and name.endswith(RESIDUAL_OUTPUTS):
            parameter.mul_(0.1)
