"""Figures of tracking against an exact truth, by motmetrics: IDF1, MOTA, switches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gdino_hf import Detections
from gdino_hf.model.box_ops import box_iou
from gdino_hf.recipes.moving_scenes import MovingObject, MovingScenes, cutout

EXAMPLES = Path(__file__).resolve().parents[1] / "demo" / "examples"


def photographs() -> list[Image.Image]:
    """The example photographs."""
    return [Image.open(EXAMPLES / name).convert("RGB") for name in ("cat.jpg", "cup.jpg", "person.jpg")]


def cutouts() -> list[tuple[str, Image.Image]]:
    """A cat, a cup and a person, cut out of the example photographs."""
    content = json.loads((EXAMPLES / "annotations.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    files = {image["id"]: image["file_name"] for image in content["images"]}
    found = []
    for row in content["annotations"]:
        x, y, width, height = row["bbox"]
        if names[row["category_id"]] != "spoon":
            picture = Image.open(EXAMPLES / files[row["image_id"]])
            found.append((names[row["category_id"]], cutout(picture, (x, y, x + width, y + height))))
    return found


def perfect(objects: Sequence[MovingObject], names: tuple[str, ...], size: tuple[int, int]) -> Detections:
    """The truth of a frame as what a perfect detector finds."""
    boxes = np.array([each.box for each in objects], dtype=np.float32).reshape(-1, 4)
    labels = [names.index(each.label) for each in objects]
    return Detections(boxes, np.full(len(boxes), 0.9), labels, names, size)


def figures(frames: Iterable[tuple[Sequence[MovingObject], Detections]]) -> dict[str, float]:
    """Compare tracks with the truth, label by label, at an IoU of 0.5.

    Args:
        frames: For each frame its truth and the tracked detections.

    Returns:
        idf1, mota, num_switches, and num_unique_objects.
    """
    import motmetrics

    frames = list(frames)
    names = frames[0][1].names
    accumulators = []
    for name in names:
        accumulator = motmetrics.MOTAccumulator(auto_id=True)
        for truth, found in frames:
            rows = [each for each in truth if each.label == name]
            own = found[np.array([text == name for text in found.text_labels], dtype=bool)]
            boxes = torch.tensor([each.box for each in rows], dtype=torch.float32).reshape(-1, 4)
            distances = 1 - box_iou(boxes, torch.from_numpy(own.boxes)).numpy()
            distances = np.where(distances > 0.5, np.nan, distances)
            accumulator.update([each.identity for each in rows], own.track_ids.tolist(), distances)
        accumulators.append(accumulator)
    metrics: Any = motmetrics.metrics.create()
    table = metrics.compute_many(
        accumulators,
        metrics=["idf1", "mota", "num_switches", "num_unique_objects"],
        names=list(names),
        generate_overall=True,
    )
    return {name: float(value) for name, value in table.loc["OVERALL"].items()}


def scenes(kind: str, seed: int = 0, **options: Any) -> MovingScenes:
    """A generated video over the example photographs."""
    return MovingScenes(photographs(), kind=kind, seed=seed, **options)
