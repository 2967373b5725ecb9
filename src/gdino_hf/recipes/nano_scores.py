"""Fit the class scores of a gdino-nano on photographs kept back from training, and fold the fit into its weights.

    python -m gdino_hf.recipes.nano_scores runs/mixed --everyday everyday --export runs/gdino-nano

Every token logit l of the model becomes factor * l + shift. The two numbers come from what a `Detector` finds in the
photographs that `nano_mixed --hold-out` kept back, asked for all names at once:

- the score at which F1 is best, among those with the wanted precision, becomes the default threshold of 0.3;
- the factor is the likeliest one for which this holds, if the score of a detection is the probability that it is right.

The order of a name's detections stays the same, and so do all boxes. Works on any checkpoint, see `nano_rating`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ..data.coco import category_names, read_coco
from ..detection.detection_options import THRESHOLD
from ..detection.detector import DetectionError, Detector
from ..evaluation.confusion import pairwise_iou
from ..model.modeling_gdino import GDinoForObjectDetection
from .mixed_data import HOLD_OUT, held_out
from .nano import export
from .nano_rating import model_parser, told_model

# Detections below it are not looked at: no threshold will be as low.
LOWEST = 0.02
RIGHT_IOU = 0.5
# Factors that the fit may choose from.
FACTORS = np.geomspace(0.25, 4.0, 161)


@dataclass(frozen=True)
class Judged:
    """Detections in annotated photographs.

    Attributes:
        scores: (N,) in 0..1.
        right: (N,) bool, whether a detection has the name of an annotated box and overlaps it by `RIGHT_IOU`; each box
            counts once, for its best detection.
        num_boxes: Number of annotated boxes.
    """

    scores: np.ndarray
    right: np.ndarray
    num_boxes: int

    def at(self, threshold: float) -> tuple[float, float]:
        """Return precision (1 if nothing passes) and recall of the detections above a threshold."""
        passed = self.right[self.scores > threshold]
        return float(passed.mean()) if len(passed) else 1.0, float(passed.sum() / max(1, self.num_boxes))


@dataclass(frozen=True)
class ScoreFit:
    """What every token logit is multiplied by, and what is added then."""

    factor: float
    shift: float

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Return the new scores (N,) for scores in 0..1 that follow from one logit."""
        return _sigmoid(self.factor * _logit(scores) + self.shift)


def _logit(scores: Any) -> np.ndarray:
    clipped = np.clip(np.asarray(scores, dtype=np.float64), 1e-6, 1 - 1e-6)
    return np.log(clipped) - np.log1p(-clipped)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def right_detections(
    boxes: np.ndarray, labels: np.ndarray, true_boxes: np.ndarray, true_labels: np.ndarray, crowd: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tell which detections of one photograph are right.

    Args:
        boxes: (N, 4) xyxy, best first.
        labels: (N,).
        true_boxes: (M, 4) xyxy.
        true_labels: (M,).
        crowd: (M,) bool, boxes of many objects, which make a detection neither right nor wrong.

    Returns:
        (N,) bool: whether a detection is right, and whether it counts.
    """
    overlap = pairwise_iou(boxes, true_boxes) * (labels[:, None] == true_labels[None])
    in_crowd = (pairwise_iou(boxes, true_boxes, over_first_area=True) * (labels[:, None] == true_labels[None]))[
        :, crowd
    ]
    right, free = np.zeros(len(boxes), dtype=bool), ~crowd
    for index, row in enumerate(overlap):
        best = np.where(free, row, 0.0)
        if best.max(initial=0.0) >= RIGHT_IOU:
            right[index] = True
            free[best.argmax()] = False
    return right, right | (in_crowd.max(axis=1, initial=0.0) < RIGHT_IOU)


def judge(detector: Detector, rows: Iterable[Mapping[str, Any]], names: Sequence[str], **options: Any) -> Judged:
    """Detect all names in annotated photographs.

    Args:
        detector: The detector.
        rows: Rows with "image", "boxes", "names" and "crowd", annotated for all names.
        names: The names.
        **options: Further options of the detector, such as `nms_threshold`.

    Raises:
        DetectionError: A photograph cannot be used.
    """
    rows, number = list(rows), {name: index for index, name in enumerate(names)}
    scores, right, count = [], [], 0
    stream = detector.stream([row["image"] for row in rows], names, threshold=LOWEST, **options)
    for row, (_, found) in zip(rows, stream, strict=True):
        if isinstance(found, DetectionError):
            raise found
        true_labels = np.array([number[name] for name in row["names"]], dtype=np.int64)
        true_boxes = np.asarray(row["boxes"], dtype=np.float64).reshape(-1, 4)
        crowd = np.asarray(row["crowd"], dtype=bool)
        hits, counts = right_detections(found.boxes, found.labels, true_boxes, true_labels, crowd)
        scores.append(found.scores[counts])
        right.append(hits[counts])
        count += int((~crowd).sum())
    return Judged(np.concatenate([*scores, []]), np.concatenate([*right, []]).astype(bool), count)


def fit_scores(judged: Judged, precision: float = 0.6, threshold: float = THRESHOLD) -> ScoreFit:
    """Choose factor and shift, see the module's text.

    Args:
        judged: Detections in photographs that the model was not trained on.
        precision: Wanted precision at the threshold, 0..1; where no score reaches it, F1 alone counts.
        threshold: Threshold at which F1 should be best, 0..1.

    Raises:
        ValueError: No detection is right.
    """
    if not judged.right.any():
        raise ValueError(
            f"None of {len(judged.scores)} detections is right, so no score can be fitted; train the model further, or "
            "give more photographs."
        )
    order = np.argsort(-judged.scores, kind="stable")
    scores, right = judged.scores[order], judged.right[order]
    kept, hits = np.arange(1, len(scores) + 1), right.cumsum()
    f1 = 2 * hits / (kept + judged.num_boxes)
    precise = hits / kept >= precision
    best = int(np.where(precise | ~precise.any(), f1, -1.0).argmax())
    logits = _logit(scores)
    # Halfway between the last detection that passes and the first that does not.
    middle = float(logits[best : best + 2].mean())
    target = math.log(threshold / (1 - threshold))
    signs = np.where(right, 1.0, -1.0)
    losses = [np.logaddexp(0, -signs * (factor * (logits - middle) + target)).mean() for factor in FACTORS]
    factor = float(FACTORS[int(np.argmin(losses))])
    return ScoreFit(factor, target - factor * middle)


@torch.no_grad()
def fold(model: GDinoForObjectDetection, fit: ScoreFit) -> None:
    """Change a model's weights so that every token logit l becomes factor * l + shift, and no box changes.

    The logits are products with the text features that leave the encoder, plus a bias. These features are scaled where
    they leave it, and the decoder's attention over the text is scaled back.

    Args:
        model: The model, changed in place.
        fit: Factor and shift.

    Raises:
        ValueError: The model's class heads have no bias, or they normalize the text features.
    """
    if model.config.class_head != "scaled_bias":
        raise ValueError(
            f"The model's class_head is {model.config.class_head!r}, but only 'scaled_bias' can take a factor and a "
            "shift into its weights."
        )
    encoder_layers, decoder_layers = cast(Any, model.model.encoder.layers), cast(Any, model.model.decoder.layers)
    last = encoder_layers[-1].text_enhancer_layer.layer_norm_after
    for parameter in (last.weight, last.bias):
        parameter.mul_(fit.factor)
    for layer in decoder_layers:
        for linear in (layer.encoder_attn_text.key, layer.encoder_attn_text.value):
            linear.weight.div_(fit.factor)
    for head in cast(Any, (*model.class_embed, model.model.encoder_output_class_embed)):
        head.bias.mul_(fit.factor).add_(fit.shift)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit the scores of one model, export it, and print what the default threshold does before and after."""
    parser = model_parser(__doc__)
    parser.add_argument("--everyday", required=True, help="folder with train.json and images/")
    parser.add_argument("--export", required=True, help="folder for the model with fitted scores")
    parser.add_argument("--hold-out", type=int, default=HOLD_OUT, help="every so many-th photograph was kept back")
    parser.add_argument("--precision", type=float, default=0.6, help="wanted precision at the default threshold")
    parser.add_argument("--nms", type=float, metavar="IOU", help="as in gdino detect (default: the processor's own)")
    options = parser.parse_args(arguments)
    model, processor = told_model(options)
    file = Path(options.everyday) / "train.json"
    rows = read_coco(file)
    kept_back = [rows[index] for index in held_out(len(rows), options.hold_out)]
    # Packed weights cannot be exported, so the detector leaves the model as it is.
    detector = Detector(model, processor=processor, optimize=False)
    judged = judge(detector, kept_back, category_names(file), nms_threshold=options.nms)
    fit = fit_scores(judged, options.precision)
    fold(model, fit)
    export(model, processor, Path(options.export))
    before, after = judged.at(THRESHOLD), Judged(fit(judged.scores), judged.right, judged.num_boxes).at(THRESHOLD)
    print(
        json.dumps(
            {
                "photographs": len(kept_back),
                "factor": round(fit.factor, 4),
                "shift": round(fit.shift, 4),
                "before": {"precision": round(before[0], 4), "recall": round(before[1], 4)},
                "after": {"precision": round(after[0], 4), "recall": round(after[1], 4)},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
