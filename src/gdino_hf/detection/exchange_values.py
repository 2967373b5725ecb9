"""Values that every exchange format writes and reads: short exact numbers, labels by name, and what is left out."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..model.printable import printable
from ..model.text_prompt import shorten

logger = logging.getLogger(__name__)

# A float64 has 15 to 17 significant digits.
_MOST_DECIMALS = 15


def rounded(
    values: np.ndarray, restore: Callable[[np.ndarray], np.ndarray], boxes: np.ndarray, decimals: int = 2
) -> np.ndarray:
    """Round numbers to the fewest decimals from which reading gives the same boxes.

    Args:
        values: (N, 4) float64 numbers of a format.
        restore: Turns such numbers into (N, 4) xyxy in pixels.
        boxes: (N, 4) float32 boxes that reading should give.
        decimals: Fewest decimals.

    Returns:
        (N, 4) float64; the numbers as they are if no rounding gives the same boxes.
    """
    for places in range(decimals, _MOST_DECIMALS + 1):
        short = np.round(values, places)
        if np.array_equal(restore(short).astype(np.float32), boxes):
            return short
    return values


def corner_sizes(boxes: np.ndarray) -> np.ndarray:
    """Return xyxy boxes as (N, 4) float64 x, y, width, height with few decimals, in pixels."""
    precise = decimal(boxes)
    values = np.concatenate([precise[:, :2], precise[:, 2:] - precise[:, :2]], axis=1)
    return rounded(values, from_corner_sizes, boxes)


def from_corner_sizes(values: np.ndarray) -> np.ndarray:
    """Return (N, 4) x, y, width, height as xyxy."""
    return np.concatenate([values[:, :2], values[:, :2] + values[:, 2:]], axis=1)


def center_sizes(boxes: np.ndarray) -> np.ndarray:
    """Return xyxy boxes as (N, 4) float64 center x, center y, width, height."""
    precise = decimal(boxes)
    return np.concatenate([(precise[:, :2] + precise[:, 2:]) / 2, precise[:, 2:] - precise[:, :2]], axis=1)


def from_center_sizes(values: np.ndarray) -> np.ndarray:
    """Return (N, 4) center x, center y, width, height as xyxy."""
    half = values[:, 2:] / 2
    return np.concatenate([values[:, :2] - half, values[:, :2] + half], axis=1)


def decimal(numbers: np.ndarray) -> np.ndarray:
    """Return float32 numbers as the float64 of their shortest decimals: 12.3 for the float32 12.300000190734863."""
    flat = np.asarray(numbers, dtype=np.float32)
    return np.array([float(str(number)) for number in flat.ravel()], dtype=np.float64).reshape(flat.shape)


def box_table(boxes: Any) -> np.ndarray:
    """Return boxes that were read as an (N, 4) float64 table, also if there are none."""
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4)


def values_of(
    boxes: Any,
    texts: Iterable[Any],
    size: tuple[int, int] | None,
    names: Sequence[str] | None = None,
    scores: Iterable[Any] | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Return the arguments of `Detections` for boxes that were read.

    Args:
        boxes: N rows of xyxy in pixels.
        texts: Label of each box.
        size: (width, height) of the picture in pixels.
        names: All labels in the order of their indices; None takes those of the boxes in order of appearance.
        scores: Score of each box in 0..1; None, or None for a box, is 1.
        **others: Further attributes.

    Raises:
        ValueError: There is no size, or a label is not among the names.
    """
    if size is None:
        raise ValueError("The format does not hold the picture's size; give size=(width, height) in pixels.")
    texts = [str(text) for text in texts]
    names = tuple(dict.fromkeys(texts)) if names is None else tuple(names)
    index = {name: place for place, name in enumerate(names)}
    unknown = next((text for text in texts if text not in index), None)
    if unknown is not None:
        raise ValueError(f"The label {shorten(unknown)} is not among names; name all labels, or leave names out.")
    table = box_table(boxes)
    scores = [1.0] * len(table) if scores is None else [1.0 if score is None else float(score) for score in scores]
    labels = [index[text] for text in texts]
    return {"boxes": table, "scores": scores, "labels": labels, "names": names, "size": size, **others}


def whole_numbers(values: Iterable[Any]) -> list[int] | None:
    """Return track ids that were read, or None if a box has none."""
    ids = list(values)
    return [int(number) for number in ids] if ids and all(number is not None for number in ids) else None


def say_left_out(found: Any, format_name: str, *attributes: str) -> None:
    """Say once for each format and attribute, in one sentence, that the format has no place for it.

    Args:
        found: `Detections` that are written.
        format_name: The format, as users know it.
        *attributes: Attributes that the format cannot hold.
    """
    for attribute in attributes:
        if getattr(found, attribute) is not None:
            _say_once(format_name, attribute)


@functools.cache
def _say_once(format_name: str, attribute: str) -> None:
    logger.warning("%s has no place for %s, which are left out.", format_name, attribute.replace("_", " "))


def kept_library(name: str, purpose: str, extra: str = "formats") -> Any:
    """Import an optional library.

    Args:
        name: Module.
        purpose: What needs it, as the subject of a sentence: "COCO masks need".
        extra: The package's extra that installs it.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise ImportError(f'{purpose} {package}; pip install "gdino-hf[{extra}]", or {package} alone.') from error


def picture_name(found: Any, given: str | None) -> str:
    """Return the name that a file format states for a picture: the one given, the source, or "image"."""
    return given if given is not None else found.source if found.source is not None else "image"


def encodable(text: str | None) -> str | None:
    """Return text that UTF-8 can encode: bytes of a file name that are not UTF-8 become backslash escapes."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode("utf-8")


def entry(row: Any, key: str, what: str) -> Any:
    """Return a value of a mapping that was read.

    Raises:
        ValueError: It is no mapping, or it lacks the key.
    """
    if not isinstance(row, Mapping) or key not in row:
        raise ValueError(f"{what} {printable(row, 80)} has no {key!r}; it is not in the documented format.")
    return row[key]
