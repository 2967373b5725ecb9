"""An albumentations pipeline in place of the package's own augmentation."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..error_text import reason
from ..model.printable import printable
from .transforms import Example

# Formats of boxes in albumentations: corners or corner and size, in pixels or as fractions.
_FORMATS = ("pascal_voc", "coco", "yolo", "albumentations")


class AlbumentationsPipeline:
    """Apply an `albumentations.Compose` to images with their boxes; use it as the collator's `transform`.

    ```python
    pipeline = A.Compose([A.RandomCrop(320, 320), A.HorizontalFlip()], bbox_params=A.BboxParams("pascal_voc"))
    collator = GDinoDataCollator(processor, transform=AlbumentationsPipeline(pipeline))
    ```

    Boxes may be in any of its formats, with label fields of any name; names, crowds and spans follow their boxes, and a
    box that the pipeline drops takes them with it. Mirroring does not swap "left" and "right" in names and captions, as
    `RandomHorizontalFlip` does, since a pipeline does not tell whether it mirrored. The pipeline is seeded for each
    image by the collator, so training draws the same after a resume.

    Args:
        pipeline: The `Compose`, with `bbox_params`.

    Raises:
        ValueError: It has no `bbox_params`, without which boxes would stay where they were.
    """

    def __init__(self, pipeline: Any) -> None:
        processors = getattr(pipeline, "processors", {})
        if "bboxes" not in processors:
            raise ValueError(
                "The albumentations pipeline has no bbox_params, so boxes would not follow their images; build it with "
                'Compose(..., bbox_params=BboxParams("pascal_voc")).'
            )
        params = processors["bboxes"].params
        self.pipeline = pipeline
        self.format = str(getattr(params.format, "value", params.format))
        if self.format not in _FORMATS:
            raise ValueError(f"The boxes' format {self.format!r} is unknown; use one of {', '.join(_FORMATS)}.")
        self.label_fields = list(params.label_fields or ())

    def __call__(self, example: Example, rng: random.Random) -> Example:
        image = np.asarray(example["image"].convert("RGB"))
        boxes = np.asarray(example["boxes"], dtype=np.float64).reshape(-1, 4)
        numbers = np.arange(len(boxes), dtype=np.float64)
        given = self._to_format(boxes, image.shape[1], image.shape[0])
        if not self.label_fields:
            # Further columns of boxes stay beside them.
            given = np.concatenate([given, numbers[:, None]], axis=1)
        self.pipeline.set_random_seed(rng.randrange(2**31))
        result = self.pipeline(image=image, bboxes=given, **{name: numbers.tolist() for name in self.label_fields})
        changed = np.ascontiguousarray(result["image"])
        found = np.asarray(result["bboxes"], dtype=np.float64)
        found = found.reshape(-1, 4 if self.label_fields else 5)
        kept = result[self.label_fields[0]] if self.label_fields else found[:, 4]
        kept = [round(float(number)) for number in kept]
        new = {**example, "image": Image.fromarray(_bytes(changed))}
        new["boxes"] = self._from_format(found[:, :4], changed.shape[1], changed.shape[0]).astype(np.float32)
        for name in ("names", "crowd", "spans"):
            if example.get(name) is not None:
                new[name] = [example[name][number] for number in kept]
        # The processor resizes what the pipeline returns.
        new.pop("resized", None)
        return new

    def _to_format(self, boxes: np.ndarray, width: int, height: int) -> np.ndarray:
        scale = np.array([width, height] * 2, dtype=np.float64)
        # albumentations refuses boxes that end outside of their image, even by rounding.
        boxes = boxes.clip(0, scale)
        if self.format in ("pascal_voc", "albumentations"):
            return boxes if self.format == "pascal_voc" else boxes / scale
        sizes = boxes[:, 2:] - boxes[:, :2]
        if self.format == "coco":
            return np.concatenate([boxes[:, :2], sizes], axis=1)
        return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, sizes], axis=1) / scale

    def _from_format(self, boxes: np.ndarray, width: int, height: int) -> np.ndarray:
        scale = np.array([width, height] * 2, dtype=np.float64)
        if self.format in ("pascal_voc", "albumentations"):
            return boxes if self.format == "pascal_voc" else boxes * scale
        if self.format == "coco":
            return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        half = boxes[:, 2:] / 2
        return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1) * scale


def load_pipeline(file: str | Path) -> AlbumentationsPipeline:
    """Load a pipeline that `albumentations.save` wrote as JSON or YAML.

    Args:
        file: The file.

    Raises:
        ImportError: albumentations is not installed.
        ValueError: The file cannot be read, or its pipeline has no `bbox_params`.
    """
    try:
        albumentations = importlib.import_module("albumentations")
    except ImportError as error:
        raise ImportError(f"{printable(file)} needs albumentations; pip install albumentations.") from error
    form = "yaml" if str(file).lower().endswith((".yaml", ".yml")) else "json"
    try:
        pipeline = albumentations.load(file, data_format=form)
    # The library raises exceptions of many types on files that are no pipelines.
    except Exception as error:
        raise ValueError(
            f"{printable(file)} cannot be read as an albumentations pipeline ({reason(error)}); write it with "
            "albumentations.save."
        ) from error
    return AlbumentationsPipeline(pipeline)


def _bytes(image: np.ndarray) -> np.ndarray:
    """Return an image with 8 bits a colour; pipelines that end in floats in 0..1 are scaled."""
    if image.dtype == np.uint8:
        return image
    if not np.issubdtype(image.dtype, np.floating) or image.min(initial=0) < 0 or image.max(initial=0) > 1:
        raise ValueError(
            f"The albumentations pipeline returns {image.dtype} values that are not 0..1; leave out Normalize and "
            "ToTensorV2, since the processor does this."
        )
    return (image * 255).round().astype(np.uint8)
