"""Average precision of a model over rows, each process its share of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from ..evaluation.box_map import evaluate_boxes
from ..evaluation.ground_truth import GroundTruth, rows_ground_truth
from ..evaluation.predict import predict
from ..evaluation.prediction_file import Predictions


@dataclass(frozen=True)
class Measurement:
    """What a model found where the truth is known.

    Attributes:
        figures: COCO's metrics by name, 0..1, -1 where there is nothing of that size.
        truth: Of all rows.
        predictions: Of all rows that could be read.
    """

    figures: dict[str, float]
    truth: GroundTruth
    predictions: Predictions


def measure(
    model: Any,
    processor: Any,
    rows: Any,
    labels: Sequence[str],
    batch_size: int = 8,
    progress: str = "evaluate",
    truth: GroundTruth | None = None,
) -> Measurement:
    """Predict with all labels as the prompt and judge as COCO does.

    Args:
        model: A GDinoForObjectDetection.
        processor: Its processor.
        rows: A data set or a list, as `read_coco` gives them.
        labels: The names to look for.
        batch_size: Images per forward.
        progress: What the progress bar is called.
        truth: Of the rows, as their file has it; by default what the rows say, whose boxes are cut at the picture's
            edge and sized as boxes.

    Returns:
        The same in every process.

    Raises:
        ImportError: faster-coco-eval is not installed.
    """
    state = PartialState()
    own, place, number = rows, state.process_index, state.num_processes
    if number > 1:
        own = rows.select(range(place, len(rows), number)) if hasattr(rows, "select") else rows[place::number]
    found = predict(model, processor, own, labels, batch_size=batch_size, progress=progress)
    if number > 1:
        found = Predictions(found.header, gather_object(found.images), gather_object(found.failed))
    truth = rows_ground_truth(rows, labels) if truth is None else truth
    return Measurement(evaluate_boxes(*truth.paired_with(found.images)).summary(), truth, found)
