"""Find the stage of a gdino-nano that loses accuracy: the teacher, the encoder's proposals, or the decoder.

    python -m gdino_hf.recipes.nano_stages runs/mixed --everyday everyday --backbone csp_pan_head

Every photograph is asked for all names of the file. Teacher and proposals see one object in many cells and need
non-maximum suppression; the decoder should not, so what suppression adds to it is what it loses to duplicates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.coco import category_names, read_coco
from ..evaluation.coco_results import average_precision
from ..model.box_ops import batched_nms, cxcywh_to_xyxy
from ..model.csp_pan import CspPanBackbone
from .closed_set_teacher import ClosedSetHead
from .nano import teacher_of
from .nano_rating import model_parser, told_model

BATCH_SIZE = 8
# Pairs of box and name before suppression, and detections after it.
MOST_CANDIDATES = 1000
MOST_DETECTIONS = 100
IOU = {"teacher, suppressed": 0.6, "encoder, suppressed": 0.6, "decoder": None, "decoder, suppressed": 0.7}


def detections(scores: Tensor, boxes: Tensor, iou: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Select the best pairs of box and name of one photograph.

    Args:
        scores: (S, C) scores of each name.
        boxes: (S, 4) cxcywh in [0, 1].
        iou: A pair is dropped if its box overlaps that of a better pair of the same name more than this; None for none.

    Returns:
        Scores (K,), names (K,) and boxes (K, 4) xyxy in [0, 1] of at most `MOST_DETECTIONS` pairs, best first.
    """
    best, place = scores.flatten().topk(min(MOST_CANDIDATES, scores.numel()))
    names, corners = place % scores.shape[1], cxcywh_to_xyxy(boxes[place // scores.shape[1]])
    kept = torch.arange(len(best)) if iou is None else batched_nms(corners, best, names, iou)
    kept = kept[:MOST_DETECTIONS]
    return best[kept], names[kept], corners[kept]


def name_scores(logits: Tensor, phrase_ids: Tensor, num_names: int) -> Tensor:
    """Return the mean score of each name's tokens.

    Args:
        logits: (S, >= T) token logits.
        phrase_ids: (T,) index of the name that each token belongs to, -1 on other tokens.
        num_names: Number of names C.

    Returns:
        (S, C) scores in [0, 1].
    """
    share = (phrase_ids[:, None] == torch.arange(num_names)).float()
    return logits[:, : len(phrase_ids)].sigmoid() @ (share / share.sum(0).clamp(min=1))


@torch.no_grad()
def stages(
    model: Any, processor: Any, backbone: Any, teacher: ClosedSetHead, images: Sequence[Any], names: Sequence[str]
) -> Any:
    """Compute what each stage detects.

    Args:
        model: A GDinoForObjectDetection in eval mode.
        processor: The model's processor, with a fixed size.
        backbone: The image backbone that the teacher was trained with, in eval mode; the model's may differ.
        teacher: That backbone's own detection head, with one class per name.
        images: PIL images.
        names: Names to detect.

    Yields:
        For each image the result of `detections` by stage; the stages are the keys of `IOU`.

    Raises:
        ValueError: The names do not fit one prompt.
    """
    inputs = processor(images=list(images), text=[list(names)] * len(images))
    if len(inputs["input_ids"]) > len(images):
        raise ValueError(f"{len(names)} names do not fit in one prompt; raise max_text_len.")
    outputs = model(**inputs, output_hidden_states=True)
    scores, boxes = teacher(backbone(inputs["pixel_values"]).feature_maps)
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    for image in range(len(images)):
        ids = text.phrase_ids[image]
        proposals = name_scores(outputs.enc_outputs_class[image], ids, len(names))
        queries = name_scores(outputs.logits[image], ids, len(names))
        found = {
            "teacher": (scores[image], boxes[image]),
            "encoder": (proposals, outputs.enc_outputs_coord_logits[image].sigmoid()),
            "decoder": (queries, outputs.pred_boxes[image]),
        }
        yield {stage: detections(*found[stage.split(",")[0]], iou) for stage, iou in IOU.items()}


def rate_stages(
    model: Any, processor: Any, backbone: Any, teacher: ClosedSetHead, annotations: Path
) -> dict[str, dict[str, float]]:
    """Compute COCO's AP and AP50 of every stage.

    Args:
        model: A GDinoForObjectDetection in eval mode.
        processor: The model's processor.
        backbone: The image backbone that the teacher was trained with, in eval mode.
        teacher: That backbone's own detection head, with one class per name of the file.
        annotations: COCO json file.

    Returns:
        Metrics by stage.
    """
    rows, names = read_coco(annotations), category_names(annotations)
    ids = {entry["name"]: entry["id"] for entry in json.loads(annotations.read_text(encoding="utf-8"))["categories"]}
    found: dict[str, list[dict[str, Any]]] = {stage: [] for stage in IOU}
    for start in range(0, len(rows), BATCH_SIZE):
        batch = [rows[index] for index in range(start, min(start + BATCH_SIZE, len(rows)))]
        images = [row["image"].convert("RGB") for row in batch]
        for row, result in zip(batch, stages(model, processor, backbone, teacher, images, names), strict=True):
            size = torch.tensor([row["width"], row["height"]] * 2)
            for stage, (scores, labels, corners) in result.items():
                found[stage] += [
                    {
                        "image_id": row["image_id"],
                        "category_id": ids[names[label]],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "score": score,
                    }
                    for score, label, (x1, y1, x2, y2) in zip(
                        scores.tolist(), labels.tolist(), (corners * size).tolist(), strict=True
                    )
                ]
    metrics = {stage: average_precision(annotations, entries) for stage, entries in found.items()}
    return {stage: {name: round(values[name], 4) for name in ("AP", "AP50")} for stage, values in metrics.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Rate every stage of one model and print the metrics as json."""
    parser = model_parser(__doc__)
    parser.add_argument("--everyday", required=True, help="folder with val.json and images/")
    parser.add_argument("--backbone", required=True, help="folder of the image backbone with its detection head")
    options = parser.parse_args(arguments)
    model, processor = told_model(options)
    annotations = Path(options.everyday) / "val.json"
    teacher = teacher_of(options.backbone, category_names(annotations))
    backbone = CspPanBackbone.from_pretrained(options.backbone).eval()
    rated = rate_stages(model, processor, backbone, teacher, annotations)
    print(json.dumps(rated, indent=2))


if __name__ == "__main__":
    main()
