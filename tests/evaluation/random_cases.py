"""Random predictions and ground truth for the cases on which evaluators disagree, and pycocotools as reference."""

from __future__ import annotations

import contextlib
import io
import random

LABELS = 4


def random_case(seed: int) -> tuple[list[dict], list[dict]]:
    """Return predictions and references of a few images.

    They include tied scores, more than a hundred detections of one label, crowds, images without ground truth or
    without predictions, labels without ground truth, and areas on the borders between sizes.
    """
    rng = random.Random(seed)
    predictions, references = [], []
    for _ in range(rng.randint(1, 5)):
        truths = [
            (rng.randrange(LABELS - 1), _box(rng), rng.random() < 0.25) for _ in range(rng.choice([0, 0, 1, 3, 8]))
        ]
        found = []
        for _ in range(rng.choice([0, 2, 10, 250])):
            label, box = rng.randrange(LABELS), _box(rng)
            if truths and rng.random() < 0.5:
                near, (x, y, w, h), _ = rng.choice(truths)
                box = (x + rng.randint(0, 4), y + rng.randint(0, 4), w + rng.randint(0, 4), h + rng.randint(0, 4))
                label = near if rng.random() < 0.8 else label
            found.append((label, box, rng.choice([rng.random(), round(rng.random(), 1)])))
        areas = [rng.choice([w * h, 0.6 * w * h, 32.0**2, 96.0**2]) for _, (_, _, w, h), _ in truths]
        predictions.append(
            {
                "boxes": [_corners(box) for _, box, _ in found],
                "scores": [score for _, _, score in found],
                "labels": [label for label, _, _ in found],
            }
        )
        references.append(
            {
                "boxes": [_corners(box) for _, box, _ in truths],
                "labels": [label for label, _, _ in truths],
                "crowd": [crowd for _, _, crowd in truths],
                "area": areas,
            }
        )
    return predictions, references


def pycocotools_stats(truths: list[dict], detections: list[dict], images: list[int], labels: list[int]) -> list[float]:
    """Return the twelve metrics of pycocotools for annotations in COCO's format, without ids.

    Both collections are built by hand, because pycocotools cannot load an empty list of detections.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def collection(annotations):
        made = COCO()
        made.dataset = {
            "images": [{"id": image} for image in images],
            "categories": [{"id": label} for label in labels],
            "annotations": [{"iscrowd": 0, **item, "id": place} for place, item in enumerate(annotations, start=1)],
        }
        made.createIndex()
        return made

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(collection(truths), collection(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def coco_annotations(items: list[dict]) -> list[dict]:
    """Convert predictions or references, listed by image, into COCO annotations."""
    annotations = []
    for image, item in enumerate(items):
        for place, (label, (x1, y1, x2, y2)) in enumerate(zip(item["labels"], item["boxes"], strict=True)):
            box = [x1, y1, x2 - x1, y2 - y1]
            annotation = {"image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3]}
            if "scores" in item:
                annotation["score"] = item["scores"][place]
            else:
                annotation |= {"iscrowd": int(item["crowd"][place]), "area": item["area"][place]}
            annotations.append(annotation)
    return annotations


def _box(rng: random.Random) -> tuple[int, int, int, int]:
    x, y = rng.randint(0, 60), rng.randint(0, 60)
    if rng.random() < 0.3:
        side = rng.choice([32, 96])
        return x, y, side, side
    return x, y, rng.randint(1, 120), rng.randint(1, 120)


def _corners(box: tuple[int, int, int, int]) -> list[int]:
    x, y, w, h = box
    return [x, y, x + w, y + h]
