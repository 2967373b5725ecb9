"""YOLO: a line for each box with its class number, center and size as fractions of the picture, and data.yaml."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..data.yolo_lines import YoloLine, parse_yolo_line
from ..model.printable import printable
from .exchange_values import center_sizes, decimal, from_center_sizes, rounded, say_left_out, values_of

# Decimals that YOLO's own tools write.
_DECIMALS = 6


def label_lines(found: Any, scores: bool) -> list[str]:
    """Return `Detections` as lines of a YOLO label file; see `Detections.to_yolo`."""
    say_left_out(found, "YOLO", "masks", "track_ids", "spans")
    scale = np.array(found.size * 2, dtype=np.float64)
    fractions = rounded(
        center_sizes(found.boxes) / scale, lambda values: from_center_sizes(values * scale), found.boxes, _DECIMALS
    )
    rows = zip(found.labels.tolist(), fractions.tolist(), decimal(found.scores).tolist(), strict=True)
    return [" ".join([str(label), *map(_plain, box), *([_plain(score)] * scores)]) for label, box, score in rows]


def read_lines(
    lines: str | Iterable[str], names: Sequence[str], size: tuple[int, int], source: str | None
) -> dict[str, Any]:
    """Return the arguments of `Detections` for a YOLO label file.

    Raises:
        ValueError: A line is not of five or six numbers, or its class has no name.
    """
    boxes, texts, scores = [], [], []
    for line in lines.splitlines() if isinstance(lines, str) else lines:
        try:
            parsed = parse_yolo_line(line)
        except ValueError:
            parsed = YoloLine(0)
        if parsed is None:
            continue
        if parsed.box is None:
            raise ValueError(
                f"The line {printable(line, 80)!r} is not a class number with x, y, width and height, and a score "
                "at most; outlines and keypoints are not read."
            )
        if not 0 <= parsed.number < len(names):
            raise ValueError(
                f"A line has class {parsed.number}, but there are {len(names)} names; give those of data.yaml."
            )
        boxes.append(parsed.box)
        texts.append(names[parsed.number])
        scores.append(parsed.score)
    scale = np.array(tuple(size) * 2, dtype=np.float64)
    table = from_center_sizes(np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale)
    return values_of(table, texts, size, names, scores, source=source)


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
