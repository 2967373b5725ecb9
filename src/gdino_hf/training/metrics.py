"""Average precision of a model over annotated rows, computed by all processes together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from ..evaluation.box_map import evaluate_boxes
from ..evaluation.ground_truth import GroundTruth, rows_ground_truth
from ..evaluation.lvis import lvis_fixed_ap
from ..evaluation.predict import predict, prediction_limits
from ..evaluation.prediction_file import Predictions


@dataclass(frozen=True)
class Measurement:
    """Predictions of a model and how they compare with the ground truth.

    Attributes:
        figures: Metrics by name, in [0, 1]; -1 where there is no box of that size.
        truth: Ground truth of all rows.
        predictions: Predictions for all rows whose image could be read.
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
    """Detect all labels in every row and compute COCO's metrics, or LVIS' fixed AP where names are known to be absent.

    In data whose images are annotated for some labels only (LVIS, or "neg_names"), a box of another label is no
    mistake, so labels count where they are annotated, as in `gdino eval`.

    Args:
        model: A GDinoForObjectDetection.
        processor: The model's processor.
        rows: A data set or a list, with the columns that `read_coco` returns.
        labels: Labels to detect.
        batch_size: Images per forward pass.
        progress: Title of the progress bar.
        truth: Ground truth as the annotation file states it. By default it is made from the rows, whose boxes are
            clipped to the image and whose areas are those of the boxes.

    Returns:
        The measurement, equal in every process.

    Raises:
        ImportError: faster-coco-eval is not installed.
    """
    state = PartialState()
    own, rank, world_size = rows, state.process_index, state.num_processes
    if world_size > 1:
        own = rows.select(range(rank, len(rows), world_size)) if hasattr(rows, "select") else rows[rank::world_size]
    truth = rows_ground_truth(rows, labels) if truth is None else truth
    limits = prediction_limits(truth.protocol)
    found = predict(model, processor, own, labels, batch_size=batch_size, progress=progress, **limits)
    if world_size > 1:
        found = Predictions(found.header, gather_object(found.images), gather_object(found.failed))
    paired = truth.paired_with(found.images)
    if truth.is_federated:
        return Measurement(lvis_fixed_ap(*paired, truth.frequencies)[0], truth, found)
    return Measurement(evaluate_boxes(*paired).summary(), truth, found)
