"""Average precision of a model over rows, each process its share."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import ImageOps
from tqdm import tqdm

from ..evaluation.coco import average_precision


@torch.no_grad()
def detection_metrics(
    model: Any, processor: Any, rows: Any, labels: Sequence[str], batch_size: int = 8
) -> dict[str, float]:
    """COCO's box metrics over rows.

    Args:
        model: A GDinoForObjectDetection; left in eval mode.
        processor: Its processor.
        rows: As `read_coco` gives them.
        labels: All names, which are the prompt.
        batch_size: Images per forward.

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR1, AR10 and AR100.
    """
    model.eval()
    found: list[dict[str, Any]] = []
    content: dict[str, list] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": index, "name": name} for index, name in enumerate(labels)],
    }
    for start in tqdm(range(0, len(rows), batch_size), desc="evaluate", disable=None, leave=False):
        batch = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
        pictures = [ImageOps.exif_transpose(row["image"]).convert("RGB") for row in batch]
        inputs = processor(images=pictures, text=[list(labels)]).to(model.device)
        sizes = [(picture.height, picture.width) for picture in pictures]
        results = processor.post_process_grounded_object_detection(
            model(**inputs),
            inputs,
            threshold=0.0,
            text_threshold=0.0,
            target_sizes=sizes,
            score="mean",
            multi_label=True,
            top_k=100,
        )
        for row, (height, width), result in zip(batch, sizes, results, strict=True):
            image = row["image_id"]
            content["images"].append({"id": image, "width": width, "height": height})
            for (x1, y1, x2, y2), name, crowd in zip(row["boxes"], row["names"], row["crowd"], strict=True):
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": image,
                        "category_id": list(labels).index(name),
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": int(crowd),
                    }
                )
            for score, label, (x1, y1, x2, y2) in zip(
                result["scores"].tolist(), result["labels"].tolist(), result["boxes"].tolist(), strict=True
            ):
                found.append(
                    {"image_id": image, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
                )
    with tempfile.TemporaryDirectory() as folder:
        truth = Path(folder) / "truth.json"
        truth.write_text(json.dumps(content), encoding="utf-8")
        return average_precision(truth, found)
