"""Tiles on a mosaic of photographs: objects that are lost in the whole picture are found, none of them twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from gdino_hf import Detector
from gdino_hf.data.formats import open_dataset
from gdino_hf.model.box_ops import box_iou

COLUMNS, ROWS, CELL = 8, 6, 500
LABELS = ("person", "car", "chair", "bottle", "cat", "dog", "horse", "bus", "train", "pizza", "umbrella", "elephant")
THRESHOLD = 0.25


@pytest.fixture(scope="module")
def mosaic(shared):
    """A picture of 4,000 x 3,000 pixels made of 48 photographs, and the boxes and label numbers of its objects."""
    rows, _ = open_dataset(shared / "data" / "everyday" / "val.json", log=False)
    picture = Image.new("RGB", (COLUMNS * CELL, ROWS * CELL))
    boxes, labels = [], []
    for place, row in zip(range(COLUMNS * ROWS), rows, strict=False):
        left, top = CELL * (place % COLUMNS), CELL * (place // COLUMNS)
        photograph = row["image"]
        scale = CELL / max(photograph.size)
        picture.paste(photograph.resize([max(1, round(scale * side)) for side in photograph.size]), (left, top))
        for box, name in zip(row["boxes"], row["names"], strict=True):
            if name in LABELS:
                boxes.append(scale * np.array(box) + [left, top, left, top])
                labels.append(LABELS.index(name))
    return picture, torch.tensor(np.array(boxes)).float(), np.array(labels)


def hits(found, boxes, labels):
    """Return for each object the number of detections of its label that overlap it by half."""
    overlaps = box_iou(boxes, torch.from_numpy(found.boxes)).numpy()
    return ((overlaps >= 0.5) & (labels[:, None] == found.labels[None])).sum(1)


@pytest.mark.slow
def test_tiles_double_the_recall_and_double_no_object(mosaic):
    picture, boxes, labels = mosaic
    detector = Detector("nano", device="cpu")
    whole = hits(detector(picture, LABELS, threshold=THRESHOLD), boxes, labels)
    tiled = hits(detector(picture, LABELS, threshold=THRESHOLD, tiles=800, batch_size=4), boxes, labels)
    recall_whole, recall_tiled = (whole > 0).mean(), (tiled > 0).mean()
    doubled = (tiled > 1).mean()
    print(f"{len(labels)} objects: recall {recall_whole:.3f} whole, {recall_tiled:.3f} tiled, {doubled:.3f} doubled")
    assert recall_tiled >= 2 * recall_whole
    assert recall_tiled > 0.1
    assert doubled <= 0.02
