"""Opening a data set of any form as ground truth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.annotation_files import annotation_file, annotation_format
from ..data.annotation_options import DEFAULT_OPTIONS, AnnotationOptions
from ..data.odvg import odvg_rows
from ..data.odvg_content import has_captions, odvg_names
from .ground_truth import GroundTruth, coco_ground_truth, rows_ground_truth
from .phrases import phrase_reference

EVALUATED_SPLITS = ("val", "test", "train")
"""Splits of a folder to evaluate, the preferred one first."""


def open_ground_truth(
    path: str | Path,
    images: str | Path | None = None,
    options: AnnotationOptions = DEFAULT_OPTIONS,
    log: bool = True,
) -> GroundTruth:
    """Open the ground truth of a data set: COCO or LVIS json, ODVG json lines, or any other form of `open_dataset`.

    Args:
        path: The annotation file or data set, or a folder that holds one; of several splits val is used, or else test,
            or else train, and "data.yaml:test" names one.
        images: Folder of the images; found as `open_dataset` finds it by default.
        options: Conventions of the file.
        log: Whether to log what was turned, scaled or left out in a COCO file.

    Returns:
        The ground truth. For captions it has no labels, and its references hold "phrases".

    Raises:
        ValueError: The file cannot be read.
    """
    file = annotation_file(path, *EVALUATED_SPLITS)
    if annotation_format(file) != "odvg":
        return coco_ground_truth(file, images, options, log)
    # Missing images are reported when they are read; evaluating stored predictions needs no images.
    rows = list(odvg_rows(file, images, options))
    truth = captions_ground_truth(rows) if has_captions(file) else rows_ground_truth(rows, odvg_names(file) or [])
    return replace(truth, sizes={row["image_id"]: (row["width"], row["height"]) for row in rows})


def captions_ground_truth(rows: Any) -> GroundTruth:
    """Collect the ground truth of rows with captions.

    Args:
        rows: Rows with "caption", "boxes", "spans" and optionally "image_id" (default: the row's index).

    Returns:
        The ground truth; its references hold "phrases" as `phrase_recall` takes them.
    """
    without_images = rows.remove_columns("image") if hasattr(rows, "remove_columns") else rows
    references = {
        row.get("image_id", index): phrase_reference(row) for index, row in enumerate(without_images) if row["caption"]
    }
    return GroundTruth([], references, rows)
