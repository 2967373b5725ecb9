"""A data set on disk as something to evaluate on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.formats import annotation_file, annotation_format
from ..data.odvg import has_captions, odvg_names, odvg_rows
from .ground_truth import GroundTruth, coco_ground_truth, rows_ground_truth
from .phrases import phrase_reference


def open_ground_truth(path: str | Path, images: str | Path | None = None) -> GroundTruth:
    """The truth of a COCO or LVIS json, or of ODVG json lines.

    Args:
        path: The file, or a folder that holds one; of several, the one named val is taken.
        images: Folder of the photographs; see the readers in `data`.

    Returns:
        The truth; of captions its references hold "phrases", and it has no labels.

    Raises:
        ValueError: It cannot be read.
    """
    file = annotation_file(path, first_choice="val")
    if annotation_format(file) == "coco":
        return coco_ground_truth(file, images)
    # A photograph that is missing fails where it is read, by its name; stored predictions are judged without any.
    rows = list(odvg_rows(file, images))
    return captions_ground_truth(rows) if has_captions(file) else rows_ground_truth(rows, odvg_names(file) or [])


def captions_ground_truth(rows: Any) -> GroundTruth:
    """The truth of rows with captions.

    Args:
        rows: Each with "caption", "boxes", "spans" and optionally "image_id", by default its place.

    Returns:
        The truth; its references hold "phrases" as `phrase_recall` takes them.
    """
    without_pictures = rows.remove_columns("image") if hasattr(rows, "remove_columns") else rows
    references = {
        row.get("image_id", index): phrase_reference(row)
        for index, row in enumerate(without_pictures)
        if row["caption"]
    }
    return GroundTruth([], references, rows)
