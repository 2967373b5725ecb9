"""Evaluation of predictions against ground truth, and the report files written from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.stored_pictures import read_row_picture
from ..detection.spreadsheet_cells import harmless_cell, table_writer
from ..whole_files import whole_file, write_whole_text
from .box_map import BoxMap, evaluate_boxes
from .confusion import best_threshold, confusion_matrix
from .ground_truth import GroundTruth
from .grounding import Protocol, phrase_recall, referring_accuracy
from .lvis import FREQUENCIES, lvis_fixed_ap
from .prediction_file import Predictions

PROTOCOLS = ("coco", "lvis", "phrases", "referring")
_MOSAIC_IMAGES = 8


@dataclass
class Evaluation:
    """Metrics of a set of predictions.

    Attributes:
        protocol: One of PROTOCOLS.
        figures: Metrics by name, in 0..1; -1 where there is no ground truth.
        num_images: Number of images evaluated.
        per_label: Metrics of each label.
        curves: Precision of each label over recall, at IoU 0.5.
        confusion: (N + 1, N + 1) confusion matrix; None for captions.
        threshold: Smallest score of a detection that counts in `confusion` and is drawn in images.
    """

    protocol: str
    figures: dict[str, float]
    num_images: int
    per_label: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    confusion: np.ndarray | None = None
    threshold: float = 0.0


def evaluate_predictions(
    truth: GroundTruth,
    predictions: Predictions,
    protocol: str = "coco",
    max_detections: int = 100,
    threshold: float | None = None,
) -> Evaluation:
    """Evaluate predictions; images without predictions, such as unreadable ones, are left out.

    Args:
        truth: Ground truth of the data set the predictions were made on.
        predictions: Predictions of a model, fresh or read from a file.
        protocol: "coco", "lvis" (fixed AP), "phrases" or "referring".
        max_detections: Maximum number of detections counted per image and label, for "coco".
        threshold: Smallest score of a detection to count in the confusion matrix, 0..1; None selects the one with the
            highest F1.

    Returns:
        The metrics.

    Raises:
        ImportError: faster-coco-eval is not installed.
        ValueError: The predictions do not match the ground truth.
    """
    found, references = truth.paired_with(predictions.images)
    if protocol in ("phrases", "referring"):
        return Evaluation(protocol, _grounding_figures(found, references, protocol), len(found))
    groups: list[str] = []
    if protocol == "lvis":
        figures, result = lvis_fixed_ap(found, references, truth.frequencies)
        groups = [FREQUENCIES[frequency] for frequency in truth.frequencies]
    else:
        result = evaluate_boxes(found, references, max_detections)
        figures = result.summary()
    threshold = best_threshold(found, references) if threshold is None else threshold
    names = unique_names(truth.labels)
    return Evaluation(
        protocol=protocol,
        figures=figures,
        num_images=len(found),
        per_label=_per_label(result, names, references, groups),
        curves={names[label]: curve for label, curve in result.curves().items()},
        confusion=confusion_matrix(found, references, len(names), threshold),
        threshold=threshold,
    )


def write_report(folder: Path, evaluation: Evaluation, truth: GroundTruth, predictions: Predictions) -> list[str]:
    """Write metrics.json and metrics.csv, and for boxes also labels.csv, confusion.csv and plots.

    Args:
        folder: Existing folder to write to.
        evaluation: Metrics to write.
        truth: Ground truth that was evaluated against.
        predictions: Predictions that were evaluated.

    Returns:
        One line for each plot that could not be drawn, with the reason. The numbers are written in any case.

    Raises:
        OSError: The folder cannot be written to.
    """
    content = {
        "settings": predictions.header,
        "protocol": evaluation.protocol,
        "images": evaluation.num_images,
        "metrics": evaluation.figures,
        "threshold": evaluation.threshold,
        "labels": evaluation.per_label,
        "failed": predictions.failed,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole_text(folder / "metrics.json", text)
    write_csv(folder / "metrics.csv", ("metric", "value"), evaluation.figures.items())
    if evaluation.confusion is None:
        return []
    columns = list(dict.fromkeys(name for figures in evaluation.per_label.values() for name in figures))
    write_csv(
        folder / "labels.csv",
        ("label", *columns),
        ((name, *(figures[column] for column in columns)) for name, figures in evaluation.per_label.items()),
    )
    names = [*unique_names(truth.labels), "background"]
    write_csv(
        folder / "confusion.csv",
        ("true \\ predicted", *names),
        ((name, *row) for name, row in zip(names, evaluation.confusion.tolist(), strict=True)),
    )
    return _draw(folder, evaluation, truth, predictions)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a table as CSV, whole or not at all.

    Args:
        path: The file.
        header: Names of the columns.
        rows: Values of each row, in the order of the columns. Text that a spreadsheet would take for a formula, such as
            a label that begins with "=", is written with an apostrophe before it.
    """
    with (
        whole_file(path) as unfinished,
        unfinished.open("w", newline="", encoding="utf-8", errors="backslashreplace") as f,
    ):
        writer = table_writer(f)
        writer.writerow([harmless_cell(value) for value in header])
        writer.writerows([harmless_cell(value) for value in row] for row in rows)


def unique_names(labels: Sequence[str]) -> list[str]:
    """Make repeated labels distinct by numbering them: a second "cat" becomes "cat (2)"."""
    seen: dict[str, int] = {}
    names = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        names.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return names


def _grounding_figures(found: Sequence[Any], references: Sequence[Any], protocol: str) -> dict[str, float]:
    if protocol == "referring":
        return referring_accuracy(found, references)
    both: tuple[Protocol, ...] = ("any", "merged")
    recall = {name: phrase_recall(found, references, name) for name in both}
    figures = {
        f"{rank} {name}-box": value for name in both for rank, value in recall[name].items() if rank != "phrases"
    }
    return {**figures, "phrases": recall["any"]["phrases"]}


def _per_label(
    result: BoxMap, names: Sequence[str], references: Sequence[Mapping[str, Any]], groups: Sequence[str]
) -> dict[str, dict[str, Any]]:
    boxes = np.zeros(len(names), dtype=np.int64)
    for reference in references:
        single = ~np.asarray(reference["crowd"], dtype=bool)
        np.add.at(boxes, np.asarray(reference["labels"])[single], 1)
    figures = result.per_label()
    nothing = dict.fromkeys(("AP", "AP50", "AP75", "AR"), -1.0)
    return {
        name: {"boxes": int(boxes[label]), **figures.get(label, nothing)}
        | ({"frequency": groups[label]} if groups else {})
        for label, name in enumerate(names)
    }


def _draw(folder: Path, evaluation: Evaluation, truth: GroundTruth, predictions: Predictions) -> list[str]:
    from .plots import plot_confusion_matrix, plot_precision_recall, prediction_mosaic

    remarks = []
    names = unique_names(truth.labels)
    try:
        plot_precision_recall(evaluation.curves, folder / "precision_recall.png")
        assert evaluation.confusion is not None
        plot_confusion_matrix(evaluation.confusion, names, folder / "confusion.png")
    except ImportError as error:
        remarks.append(str(error).rstrip("."))
    items = _mosaic_items(truth, predictions)
    if items:
        prediction_mosaic(items, names, folder / "predictions.png", threshold=evaluation.threshold)
    else:
        remarks.append("no image could be read to draw predictions on")
    return remarks


def _mosaic_items(
    truth: GroundTruth, predictions: Predictions
) -> list[tuple[Image.Image, Mapping[str, Any], Mapping[str, Any]]]:
    """Choose images spread over the data set, those with objects first, with their ground truth and predictions."""
    found, references = truth.paired_with(predictions.images)
    places = sorted(range(len(found)), key=lambda place: not len(references[place]["labels"]))
    filled = sum(bool(len(reference["labels"])) for reference in references) or len(found)
    step = max(1, filled // _MOSAIC_IMAGES)
    chosen = {found[place]["image_id"]: place for place in places[::step][:_MOSAIC_IMAGES]}
    items: list[tuple[Image.Image, Mapping[str, Any], Mapping[str, Any]]] = []
    for index, row in enumerate(truth.rows):
        place = chosen.get(row.get("image_id", index))
        if place is None:
            continue
        try:
            items.append((read_row_picture(row["image"]), references[place], found[place]))
        except (OSError, TypeError, ValueError):
            # The image may have gone since the predictions were made; the metrics do not depend on it.
            continue
        if len(items) == len(chosen):
            break
    return items
