"""Plots of training and evaluation, drawn without touching matplotlib's global state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..model.printable import printable
from ..visualize import draw_detections
from ..whole_files import whole_file
from .box_map import RECALL_POINTS

_MOST_NAMED_CURVES = 10
_MOST_WRITTEN_CELLS = 20
_MOSAIC_TILE = 320
_MARGIN = 6
_BACKGROUND = (250, 250, 250)


def plot_curves(log_history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Plot the losses over the training steps and, if there were evaluations, AP and AP50.

    Args:
        log_history: `trainer.state.log_history`: dicts with "step" and "loss", "eval_loss", "eval_AP", "eval_AP50".
        path: PNG file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    losses = {name: _series(log_history, name) for name in ("loss", "eval_loss")}
    metrics = {name: _series(log_history, f"eval_{name}") for name in ("AP", "AP50")}
    with_metrics = any(len(steps) for steps, _ in metrics.values())
    figure = _figure(11 if with_metrics else 6, 4)
    axes = figure.subplots(1, 2 if with_metrics else 1, squeeze=False)[0]
    for name, (steps, values) in losses.items():
        if len(steps):
            axes[0].plot(steps, values, label={"loss": "training", "eval_loss": "evaluation"}[name], **_marks(steps))
    axes[0].set(xlabel="step", ylabel="loss", title="Loss")
    if with_metrics:
        for name, (steps, values) in metrics.items():
            if len(steps):
                axes[1].plot(steps, values, label=name, **_marks(steps))
        axes[1].set(xlabel="step", ylabel="average precision", title="Evaluation", ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    _save(figure, path)


def plot_precision_recall(curves: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Plot precision over recall at IoU 0.5, with a thin line per label and a thick one for their mean.

    Args:
        curves: Precision (101,) of each label at recall 0, 0.01, ..., 1.
        path: PNG file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(6.5, 5)
    axis = figure.subplots()
    named = sorted(curves, key=lambda name: -float(np.mean(curves[name])))
    for place, name in enumerate(named):
        label = f"{_caption(name)} {np.mean(curves[name]):.3f}" if len(named) <= _MOST_NAMED_CURVES else None
        axis.plot(RECALL_POINTS, curves[name], color=f"C{place % 10}", linewidth=0.8, alpha=0.7, label=label)
    if named:
        mean = np.mean([curves[name] for name in named], axis=0)
        title = "labels" if len(named) != 1 else "label"
        axis.plot(RECALL_POINTS, mean, color="black", linewidth=2.2, label=f"{len(named)} {title} {mean.mean():.3f}")
        axis.legend(title="AP50", fontsize="small")
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="Precision and recall, IoU 0.5")
    axis.grid(alpha=0.3)
    _save(figure, path)


def plot_confusion_matrix(matrix: np.ndarray, names: Sequence[str], path: str | Path) -> None:
    """Plot a confusion matrix: cells are coloured by their share of the row and, in small matrices, show the count.

    Args:
        matrix: (N + 1, N + 1) counts from `confusion_matrix`.
        names: Names of the N labels.
        path: PNG file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # Labels without true or predicted boxes are left out, since they would only make the cells smaller.
    shown = [*np.flatnonzero((matrix[:-1].sum(axis=1) + matrix[:, :-1].sum(axis=0)) > 0), len(names)]
    matrix = matrix[np.ix_(shown, shown)]
    ticks = [_caption([*names, "background"][place]) for place in shown]
    side = min(4 + 0.32 * len(ticks), 24)
    figure = _figure(side + 1, side)
    axis = figure.subplots()
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    size = "small" if len(ticks) <= 40 else "xx-small"
    axis.set_xticks(range(len(ticks)), ticks, rotation=90, fontsize=size)
    axis.set_yticks(range(len(ticks)), ticks, fontsize=size)
    axis.set(xlabel="predicted", ylabel="true", title="Confusion, IoU 0.5")
    if len(ticks) <= _MOST_WRITTEN_CELLS:
        for row, column in np.argwhere(matrix > 0):
            color = "white" if share[row, column] > 0.5 else "black"
            axis.text(column, row, str(matrix[row, column]), ha="center", va="center", color=color, fontsize="x-small")
    figure.colorbar(image, label="share of the row", fraction=0.046)
    _save(figure, path)


def prediction_mosaic(
    items: Iterable[tuple[Image.Image, Mapping[str, Any], Mapping[str, Any]]],
    names: Sequence[str],
    path: str | Path,
    threshold: float = 0.3,
    columns: int = 2,
) -> None:
    """Draw ground truth and predictions of some images side by side.

    Args:
        items: Tuples of image, ground truth and prediction, the latter two as for `evaluate_boxes`.
        names: Names of the labels.
        path: PNG file to write.
        threshold: Smallest score of a prediction to draw, 0..1.
        columns: Number of images per row of the mosaic, each with ground truth and predictions.

    Raises:
        ValueError: There are no items.
    """
    tiles = [
        (
            _tile(image, reference["boxes"], reference["labels"], None, names),
            _tile(image, *_above(prediction, threshold), names),
        )
        for image, reference, prediction in items
    ]
    if not tiles:
        raise ValueError("There is no image to draw; pass at least one.")
    pair, header = 2 * _MOSAIC_TILE + _MARGIN, 22
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    width = columns * pair + (columns + 1) * 2 * _MARGIN
    sheet = Image.new("RGB", (width, header + rows * (_MOSAIC_TILE + _MARGIN) + _MARGIN), _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column in range(columns):
        left = 2 * _MARGIN + column * (pair + 2 * _MARGIN)
        draw.text((left, 3), "truth", fill=(0, 0, 0), font=font)
        draw.text((left + _MOSAIC_TILE + _MARGIN, 3), f"predicted, score {threshold:.2f} and more", (0, 0, 0), font)
    for place, (truth, predicted) in enumerate(tiles):
        left = 2 * _MARGIN + place % columns * (pair + 2 * _MARGIN)
        top = header + place // columns * (_MOSAIC_TILE + _MARGIN)
        sheet.paste(truth, (left, top))
        sheet.paste(predicted, (left + _MOSAIC_TILE + _MARGIN, top))
    with whole_file(path) as unfinished:
        sheet.save(unfinished)


def _tile(image: Image.Image, boxes: Any, labels: Any, scores: Any, names: Sequence[str]) -> Image.Image:
    """Draw an image with its boxes into a square of the mosaic's size."""
    scale = _MOSAIC_TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    zoom = np.array([size[0] / image.width, size[1] / image.height] * 2)
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * zoom
    result = {
        "boxes": boxes,
        "scores": np.ones(len(boxes)) if scores is None else scores,
        "text_labels": [names[int(label)] for label in labels],
    }
    picture = draw_detections(image.convert("RGB").resize(size), result, show_scores=scores is not None, font_size=11)
    tile = Image.new("RGB", (_MOSAIC_TILE, _MOSAIC_TILE), (225, 225, 225))
    tile.paste(picture, ((_MOSAIC_TILE - size[0]) // 2, (_MOSAIC_TILE - size[1]) // 2))
    return tile


def _above(prediction: Mapping[str, Any], threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return boxes, labels and scores of the detections that reach a threshold."""
    scores = np.asarray(prediction["scores"], dtype=np.float64)
    keep = scores >= threshold
    return np.asarray(prediction["boxes"]).reshape(-1, 4)[keep], np.asarray(prediction["labels"])[keep], scores[keep]


def _series(log_history: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and the values of one logged quantity."""
    points = [(entry["step"], entry[name]) for entry in log_history if name in entry and "step" in entry]
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _marks(steps: np.ndarray) -> dict[str, Any]:
    """Return a marker for lines of few points, which could otherwise be invisible."""
    return {"marker": "o", "markersize": 3} if len(steps) < 30 else {}


def _caption(name: str) -> str:
    """Return a label as matplotlib shows it: without control characters, and with dollar signs instead of formulas."""
    return printable(name).replace("$", r"\$")


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib; pip install "gdino-hf[train]".') from error
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | Path) -> None:
    with whole_file(path) as unfinished:
        figure.savefig(unfinished)
