"""YOLO: a line for each box, or for each outline of a mask, in fractions of the picture, and data.yaml."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..data.yolo_lines import parse_yolo_line
from ..model.printable import printable
from .coco_exchange import decode_masks
from .exchange_values import center_sizes, decimal, from_center_sizes, rounded, say_left_out, values_of
from .mask_outlines import one_outline

# Decimals that YOLO's own tools write.
_DECIMALS = 6


def label_lines(found: Any, scores: bool) -> list[str]:
    """Return `Detections` as lines of a YOLO label file; see `Detections.to_yolo`."""
    say_left_out(found, "YOLO", "track_ids", "spans")
    scale = np.array(found.size * 2, dtype=np.float64)
    if found.masks is None:
        fractions = rounded(
            center_sizes(found.boxes) / scale, lambda values: from_center_sizes(values * scale), found.boxes, _DECIMALS
        ).tolist()
    else:
        pairs = zip(found.polygons(), found.boxes, strict=True)
        fractions = [_outline(one_outline(polygons), box, found.size) for polygons, box in pairs]
    rows = zip(found.labels.tolist(), fractions, decimal(found.scores).tolist(), strict=True)
    return [" ".join([str(label), *map(_plain, values), *([_plain(score)] * scores)]) for label, values, score in rows]


def read_lines(
    lines: str | Iterable[str], names: Sequence[str], size: tuple[int, int], source: str | None
) -> dict[str, Any]:
    """Return the arguments of `Detections` for a YOLO label file.

    Raises:
        ImportError: There are outlines, but pycocotools is not installed.
        ValueError: A line is neither a box nor an outline, or its class has no name.
    """
    boxes, texts, scores, outlines = [], [], [], []
    scale = np.array(tuple(size), dtype=np.float64)
    for line in lines.splitlines() if isinstance(lines, str) else lines:
        try:
            parsed = parse_yolo_line(line, outline_scores=True)
        except ValueError as error:
            raise ValueError(
                f"The line {printable(line, 80)!r} is not a class number with x, y, width and height, or with the "
                "corners of an outline, and a score at most; keypoints are not read."
            ) from error
        if parsed is None:
            continue
        if not 0 <= parsed.number < len(names):
            raise ValueError(
                f"A line has class {parsed.number}, but there are {len(names)} names; give those of data.yaml."
            )
        corners = None if parsed.outline is None else np.reshape(parsed.outline, (-1, 2)) * scale
        outlines.append(corners)
        if corners is None:
            boxes.append(from_center_sizes(np.array([parsed.box]) * np.tile(scale, 2))[0])
        else:
            boxes.append(np.concatenate([corners.min(0), corners.max(0)]))
        texts.append(names[parsed.number])
        scores.append(parsed.score)
    masks = None
    if any(corners is not None for corners in outlines):
        # Among outlines, a box is one of four corners.
        shapes = [box[[0, 1, 2, 1, 2, 3, 0, 3]] if c is None else c for c, box in zip(outlines, boxes, strict=True)]
        masks = decode_masks([[np.ravel(shape).tolist()] for shape in shapes], size)
    table = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    return values_of(table, texts, size, names, scores, source=source, masks=masks)


def _outline(corners: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> list[float]:
    """Return the corners of a mask, or of the box of an empty one, as fractions of the picture."""
    if len(corners) == 0:
        corners = box[[0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)
    values: list[float] = np.round(corners / np.array(size, dtype=np.float64), _DECIMALS).ravel().tolist()
    return values


def data_yaml(names: Sequence[str]) -> str:
    """Return the data.yaml of a data set whose pictures are in images/ and whose label files are in labels/.

    Args:
        names: All labels in the order of their numbers.
    """
    import yaml

    content = {"path": ".", "train": "images", "val": "images", "nc": len(names), "names": dict(enumerate(names))}
    return str(yaml.safe_dump(content, allow_unicode=True, sort_keys=False))


def _plain(number: float) -> str:
    """Format a number without an exponent, which simple readers do not know."""
    text = f"{number:.17f}" if "e" in repr(number) else repr(number)
    return text.rstrip("0").rstrip(".") if "." in text else text
