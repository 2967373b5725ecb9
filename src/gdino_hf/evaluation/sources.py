"""A data set on disk as something to evaluate on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.formats import annotation_file, annotation_format, open_dataset
from .phrases import phrase_reference
from .truth import Truth, coco_truth, rows_truth


def open_truth(path: str | Path, images: str | Path | None = None) -> Truth:
    """The truth of a COCO or LVIS json, or of ODVG json lines.

    Args:
        path: The file, or a folder that holds one.
        images: Folder of the photographs; see the readers in `data`.

    Returns:
        The truth; of captions its references hold "phrases", and it has no labels.

    Raises:
        ValueError: It cannot be read.
    """
    file = annotation_file(path)
    if annotation_format(file) == "coco":
        return coco_truth(file, images)
    rows, labels = open_dataset(file, images)
    if labels is not None:
        return rows_truth(rows, labels)
    return captions_truth(rows)


def captions_truth(rows: Any) -> Truth:
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
    return Truth([], references, rows)


def has_captions(truth: Truth) -> bool:
    """Whether it holds phrases instead of labels."""
    return any("phrases" in reference for reference in truth.references.values())
