"""COCO's mean average precision as a metric of the `evaluate` library.

Load it by the path of this file, which is independent of where the package is installed:

```python
from gdino_hf.evaluation import detection_map

metric = evaluate.load(detection_map.__file__)  # or detection_map.DetectionMap()
metric.add_batch(predictions=[{"boxes": [[0, 0, 9, 9]], "scores": [0.8], "labels": [0]}],
                 references=[{"boxes": [[0, 0, 9, 8]], "labels": [0]}])
metric.compute(label_names=["cat"])  # {"AP": ..., "AP50": ..., "per_class": {"cat": {"AP": ...}}, ...}
```

`evaluate.load` copies this file and box_map.py, which therefore import nothing else of the package.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from .box_map import UNDEFINED, evaluate_boxes

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
    references: One dict per image, in the same order: "boxes" (M, 4) xyxy in pixels, "labels" (M,) int, and optionally
        "crowd" (M,) bool, or COCO's "iscrowd": regions that need not be found and in which detections are ignored;
        "area" (M,) in square pixels, which decides between small, medium and large: the segment's area where a segment
        is annotated, by default the box's;
        "image_id" int: ties between scores are broken by image id, as in COCO's tools.
    label_names: Names of the labels for "per_class": a list, or {number: name} like `config.id2label`. Without names,
        "per_class" uses the numbers.
    max_detections: Maximum number of detections counted per image and label, 100 by default.
Returns:
    AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl in 0..1, -1 where there is no ground truth of that
    kind; "per_class": {name: {"AP", "AP50", "AP75", "AR"}}.
"""


class DetectionMap(evaluate.Metric):
    """Mean average precision of boxes; `inputs_description` lists its inputs and results."""

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
        """Add the prediction and the reference of one image, each a dict as in the lists of `add_batch`."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add predictions and references of several images.

        Args:
            predictions: List of dicts as in `inputs_description`; values may be lists, arrays or tensors.
            references: List of dicts, one for each prediction.

        Raises:
            ValueError: The numbers of predictions and references differ, or a dict lacks an entry.
        """
        predictions = [] if predictions is None else list(predictions)
        references = [] if references is None else list(references)
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
        label_names: Sequence[str] | Mapping[Any, str] | None = None,
        max_detections: int = 100,
    ) -> dict[str, Any]:
        # Images without an id all got the id 0; sorting is stable, so they keep the order they were added in.
        order = sorted(range(len(references)), key=lambda place: references[place]["image_id"])
        ordered = [{**references[place], "area": references[place]["area"] or None} for place in order]
        result = evaluate_boxes([predictions[place] for place in order], ordered, max_detections)
        per_label = result.per_label()
        if label_names is None:
            named: dict[Any, dict[str, float]] = {str(label): figures for label, figures in per_label.items()}
        else:
            nothing = dict.fromkeys(("AP", "AP50", "AP75", "AR"), UNDEFINED)
            named = {name: per_label.get(label, nothing) for label, name in _names(label_names, per_label).items()}
        return {**result.summary(), "per_class": named}


def _names(label_names: Sequence[str] | Mapping[Any, str], known: Collection[int]) -> dict[int, str]:
    """Return the names by label number, after checking that they are complete and distinct."""
    pairs = label_names.items() if isinstance(label_names, Mapping) else enumerate(label_names)
    names = {int(label): str(name) for label, name in pairs}
    nameless = sorted(set(known) - names.keys())
    if nameless:
        raise ValueError(f"label_names has no name for the label {nameless[0]}; give a name for each label.")
    if len(set(names.values())) < len(names):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise ValueError(f"label_names has {twice!r} twice; give the labels different names.")
    return names


def _prediction(item: Mapping[str, Any]) -> dict[str, Any]:
    _demand(item, ("boxes", "scores", "labels"), "prediction")
    return {
        "boxes": _boxes(item["boxes"]),
        "scores": _numbers(item["scores"], float, "scores"),
        "labels": _numbers(item["labels"], int, "labels"),
    }


def _reference(item: Mapping[str, Any]) -> dict[str, Any]:
    _demand(item, ("boxes", "labels"), "reference")
    boxes = _boxes(item["boxes"])
    crowd, area = item.get("crowd", item.get("iscrowd")), item.get("area")
    return {
        "boxes": boxes,
        "labels": _numbers(item["labels"], int, "labels"),
        "crowd": [False] * len(boxes) if crowd is None else _numbers(crowd, bool, "crowd"),
        # An empty list stands for the areas of the boxes.
        "area": [] if area is None else _numbers(area, float, "area"),
        "image_id": _numbers(item.get("image_id", 0), int, "image_id")[0],
    }


def _demand(item: Mapping[str, Any], names: Sequence[str], kind: str) -> None:
    missing = [name for name in names if name not in item]
    if missing:
        raise ValueError(f"A {kind} lacks {', '.join(missing)}; it has {', '.join(map(repr, item)) or 'nothing'}.")


def _boxes(values: Any) -> list[list[float]]:
    array = _array(values, "boxes")
    # Only empty arrays are reshaped: reshaping boxes of another shape could mix up their corners.
    if array.size and (array.ndim != 2 or array.shape[1] != 4):
        raise ValueError(f"boxes has the shape {array.shape}, not (N, 4); give xyxy, one row for each box.")
    return array.astype(np.float64).reshape(-1, 4).tolist()


def _numbers(values: Any, dtype: type, name: str) -> list[Any]:
    array = _array(values, name).reshape(-1)
    if dtype is int and (array != np.trunc(array)).any():
        raise ValueError(f"{name} holds {array[array != np.trunc(array)][0]}; give whole numbers.")
    return array.astype(dtype).tolist()


def _array(values: Any, name: str) -> np.ndarray:
    """Convert lists, arrays, or tensors of any dtype on any device into an array of numbers."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        # numpy has no bfloat16.
        values = values.double() if values.is_floating_point() else values
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"{name} has rows of different lengths; make them equally long.") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {array.reshape(-1)[0]!r}; give numbers.")
    return array
