"""COCO's mean average precision as a metric of the `evaluate` library: `evaluate.load(<path of this file>)`.

```python
metric = evaluate.load("src/gdino_hf/evaluation/detection_map.py")  # or DetectionMap()
metric.add_batch(predictions=[{"boxes": [[0, 0, 9, 9]], "scores": [0.8], "labels": [0]}],
                 references=[{"boxes": [[0, 0, 9, 8]], "labels": [0]}])
metric.compute(label_names=["cat"])  # {"AP": ..., "AP50": ..., "per_class": {"cat": {"AP": ...}}, ...}
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from .box_map import ANSWER_WITHOUT_TRUTH, evaluate_boxes

_DESCRIPTION = "Average precision and recall of detected boxes, as COCO defines and pycocotools computes them."
_CITATION = """@inproceedings{lin2014microsoft,
  title={Microsoft {COCO}: Common Objects in Context},
  author={Lin, Tsung-Yi and others},
  booktitle={European Conference on Computer Vision},
  year={2014}
}"""
_INPUTS = """
Args:
    predictions: One dict per image: "boxes" (N, 4) xyxy in pixels, "scores" (N,), "labels" (N,) int.
    references: One dict per image, in the same order: "boxes" (M, 4) xyxy in pixels, "labels" (M,) int; optionally
        "crowd" (M,) bool: regions that excuse detections and need not be found;
        "area" (M,) in square pixels, of the segment where one is annotated, else of the box: small, medium, large;
        "image_id" int: among equal scores the image with the lower id comes first, as in COCO's tools.
    label_names: Names of the labels in "per_class"; numbers stand there without.
    max_detections: Detections of an image and label that count, 100 by default.
Returns:
    AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl in 0..1, -1 where there is nothing of that kind to
    find; "per_class": {name: {"AP", "AP50", "AP75", "AR"}}.
"""


class DetectionMap(evaluate.Metric):
    """Mean average precision of boxes; see `inputs_description` for what it takes and returns."""

    def _info(self) -> evaluate.MetricInfo:
        number, flag = datasets.Value("float64"), datasets.Value("bool")
        integer, box = datasets.Value("int64"), datasets.Sequence(datasets.Value("float64"), length=4)
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": {
                        "boxes": datasets.Sequence(box),
                        "scores": datasets.Sequence(number),
                        "labels": datasets.Sequence(integer),
                    },
                    "references": {
                        "boxes": datasets.Sequence(box),
                        "labels": datasets.Sequence(integer),
                        "crowd": datasets.Sequence(flag),
                        "area": datasets.Sequence(number),
                        "image_id": integer,
                    },
                }
            ),
            reference_urls=["https://cocodataset.org/#detection-eval"],
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one image; arguments as in `add_batch`, without the lists."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add images.

        Args:
            predictions: List of dicts, see `inputs_description`; arrays and tensors as well as lists.
            references: As many, of the same images.

        Raises:
            ValueError: There are not as many predictions as references, or a dict lacks something.
        """
        predictions, references = list(predictions or ()), list(references or ())
        if len(predictions) != len(references):
            raise ValueError(
                f"There are predictions of {len(predictions)} images but references of {len(references)}; give one "
                "each."
            )
        super().add_batch(
            predictions=[_prediction(item) for item in predictions],
            references=[_reference(item) for item in references],
            **kwargs,
        )

    def _compute(
        self,
        predictions: Sequence[Mapping[str, Any]],
        references: Sequence[Mapping[str, Any]],
        label_names: Sequence[str] | None = None,
        max_detections: int = 100,
    ) -> dict[str, Any]:
        # Images without an id, all of which have the same one here, keep the order they came in.
        order = sorted(range(len(references)), key=lambda place: references[place]["image_id"])
        meant = [{**references[place], "area": references[place]["area"] or None} for place in order]
        result = evaluate_boxes([predictions[place] for place in order], meant, max_detections)
        per_label = result.per_label()
        if label_names is None:
            named: dict[Any, dict[str, float]] = {str(label): figures for label, figures in per_label.items()}
        else:
            nothing = dict.fromkeys(("AP", "AP50", "AP75", "AR"), ANSWER_WITHOUT_TRUTH)
            named = {name: per_label.get(label, nothing) for label, name in enumerate(label_names)}
        return {**result.summary(), "per_class": named}


def _prediction(item: Mapping[str, Any]) -> dict[str, Any]:
    _demand(item, ("boxes", "scores", "labels"), "prediction")
    return {
        "boxes": _plain(item["boxes"], float, 4),
        "scores": _plain(item["scores"], float),
        "labels": _plain(item["labels"], int),
    }


def _reference(item: Mapping[str, Any]) -> dict[str, Any]:
    _demand(item, ("boxes", "labels"), "reference")
    boxes = _plain(item["boxes"], float, 4)
    crowd, area = item.get("crowd"), item.get("area")
    return {
        "boxes": boxes,
        "labels": _plain(item["labels"], int),
        "crowd": [False] * len(boxes) if crowd is None else _plain(crowd, bool),
        # Nothing stands for the area of the box.
        "area": [] if area is None else _plain(area, float),
        "image_id": int(item.get("image_id", 0)),
    }


def _demand(item: Mapping[str, Any], names: Sequence[str], kind: str) -> None:
    missing = [name for name in names if name not in item]
    if missing:
        raise ValueError(f"A {kind} lacks {', '.join(missing)}; it has {', '.join(map(str, item)) or 'nothing'}.")


def _plain(values: Any, dtype: type, width: int | None = None) -> list[Any]:
    """Nested lists out of lists, arrays or tensors on any device; nothing may be an empty list of any shape."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    array: np.ndarray = np.asarray(values, dtype=dtype)
    return array.reshape((-1,) if width is None else (-1, width)).tolist()
