"""Average precision as COCO defines it (Lin et al. 2014), on a COCO file and with its names as the prompt."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")


def average_precision(annotations: str | Path, detections: Sequence[dict[str, Any]]) -> dict[str, float]:
    """COCO's box metrics.

    Args:
        annotations: COCO json with the truth.
        detections: {"image_id", "category_id", "bbox" (xywh in pixels), "score"} each.

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR1, AR10 and AR100 in 0..1; -1 where the file has nothing of that size.

    Raises:
        ImportError: faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise ImportError('Average precision needs faster-coco-eval; pip install "gdino-hf[train]".') from error
    if not detections:
        return dict.fromkeys(METRICS, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval_faster(truth, truth.loadRes(list(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(METRICS, evaluation.stats, strict=False)}


@torch.no_grad()
def detect_coco(
    model: Any,
    processor: Any,
    annotations: str | Path,
    images: str | Path | None = None,
    batch_size: int = 8,
    max_detections: int = 100,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Run the model over a COCO file with all its names as the prompt.

    Every pair of query and name counts, scored by the mean of the name's tokens, the best 100 per image: the
    convention of the published zero-shot figures.

    Args:
        model: A GDinoForObjectDetection.
        processor: Its processor.
        annotations: COCO json.
        images: Folder of the photographs; `images` beside the json by default.
        batch_size: Images per forward.
        max_detections: Detections kept per image.
        limit: Only the first so many images.

    Returns:
        Detections as `average_precision` takes them.
    """
    from PIL import Image, ImageOps

    content = json.loads(Path(annotations).read_text(encoding="utf-8"))
    folder = Path(images) if images is not None else Path(annotations).parent / "images"
    categories = sorted(content["categories"], key=lambda category: category["id"])
    names = [category["name"] for category in categories]
    records = content["images"][:limit]
    model.eval()
    detections = []
    for start in tqdm(range(0, len(records), batch_size), desc="evaluate", disable=None, leave=False):
        batch = records[start : start + batch_size]
        pictures = []
        for record in batch:
            with Image.open(folder / record["file_name"]) as picture:
                # Upright, as the processor sees it: boxes are pixels of that picture.
                pictures.append(ImageOps.exif_transpose(picture).convert("RGB"))
        inputs = processor(images=pictures, text=names).to(model.device)
        outputs = model(**inputs)
        results = processor.post_process_grounded_object_detection(
            outputs,
            inputs,
            threshold=0.0,
            text_threshold=0.0,
            target_sizes=[(picture.height, picture.width) for picture in pictures],
            score="mean",
            multi_label=True,
            top_k=max_detections,
        )
        for record, result in zip(batch, results, strict=True):
            for score, label, (x1, y1, x2, y2) in zip(
                result["scores"].tolist(), result["labels"].tolist(), result["boxes"].tolist(), strict=True
            ):
                detections.append(
                    {
                        "image_id": record["id"],
                        "category_id": categories[label]["id"],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "score": score,
                    }
                )
    return detections
