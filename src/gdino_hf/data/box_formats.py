"""Finding out from all boxes of a data set what their four numbers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..model.printable import printable
from .annotation_options import BoxFormat
from .content import BoxForm
from .faults import FEW
from .frames import read_header
from .picture_sets import PictureEntry, PictureSet
from .rows import parse_number

_FORMS: tuple[BoxForm, ...] = ("xywh", "xyxy", "cxcywh")
# How far boxes may end outside of their picture, in pixels or as a fraction of it, by the rounding of tools.
_PIXEL, _FRACTION = 1.5, 0.005
# Boxes after which one form that fits all of them is certain enough to stop reading sizes.
_ENOUGH = 5000


@dataclass
class BoxVote:
    """Counts the boxes that cannot be of each form.

    Attributes:
        boxes: Number of boxes seen.
        misfits: Number of boxes that are outside of their picture, or have no area, in each form.
        is_relative: Whether all numbers lie within 0..1, with fractions among them.
        areas: Number of boxes whose annotated area is that of sizes, and of corners, but not of the other.
    """

    boxes: int = 0
    misfits: dict[BoxForm, int] = field(default_factory=lambda: dict.fromkeys(_FORMS, 0))
    relative_misfits: dict[BoxForm, int] = field(default_factory=lambda: dict.fromkeys(_FORMS, 0))
    areas: dict[str, int] = field(default_factory=lambda: {"sizes": 0, "corners": 0})
    is_within: bool = True
    has_fraction: bool = False

    def add(self, box: Any, size: tuple[float, float] | None, area: Any = None) -> None:
        """Count a box.

        Args:
            box: Its four numbers; anything else is not counted.
            size: Width and height of its picture in pixels; None if unknown.
            area: Its annotated area, if there is one.
        """
        numbers = [parse_number(value) for value in box] if isinstance(box, Sequence) and len(box) == 4 else []
        if not numbers or not all(isinstance(value, (int, float)) and abs(value) < 1e30 for value in numbers):
            return
        self.boxes += 1
        self.is_within = self.is_within and min(numbers) >= -_FRACTION and max(numbers) <= 1 + _FRACTION
        self.has_fraction = self.has_fraction or any(0 < value < 1 for value in numbers)
        for form in _FORMS:
            self.misfits[form] += not _fits(form, numbers, size, _PIXEL)
            if self.is_within:
                self.relative_misfits[form] += not _fits(form, numbers, (1.0, 1.0), _FRACTION)
        if isinstance(area, (int, float)) and area > 0:
            a, b, c, d = numbers
            fits = {"sizes": _near(c * d, area), "corners": c > a and d > b and _near((c - a) * (d - b), area)}
            for kind, other in (("sizes", "corners"), ("corners", "sizes")):
                self.areas[kind] += fits[kind] and not fits[other]

    @property
    def is_relative(self) -> bool:
        """Whether the boxes are fractions of their pictures."""
        return self.boxes > 0 and self.is_within and self.has_fraction

    def possible(self) -> list[BoxForm]:
        """Return the forms that all boxes fit, but for a few faults."""
        misfits = self.relative_misfits if self.is_relative else self.misfits
        found = [form for form in _FORMS if misfits[form] <= FEW * self.boxes]
        if len(found) > 1 and min(self.areas.values()) == 0 < max(self.areas.values()):
            by_corners = self.areas["corners"] > 0
            found = [form for form in found if (form == "xyxy") == by_corners] or found
        return found

    def decide(self, option: BoxFormat, place: str) -> tuple[BoxForm, bool]:
        """Return the form, and whether the boxes are fractions.

        Args:
            option: The form if it was given, or "auto".
            place: Name of the data set, for the error.

        Raises:
            ValueError: No form fits, or several do, and none was given.
        """
        if option != "auto":
            return option, self.is_relative
        found = self.possible()
        if not self.boxes:
            return "xywh", False
        if len(found) == 1:
            return found[0], self.is_relative
        which = "fit all of " + " and ".join(found) if found else "fit none of xywh, xyxy and cxcywh"
        raise ValueError(
            f"{place} does not say what the four numbers of its {self.boxes} boxes are, and they {which}; give "
            "--box-format xywh, xyxy or cxcywh."
        )


def _fits(form: BoxForm, box: Sequence[float], size: tuple[float, float] | None, slack: float) -> bool:
    a, b, c, d = box
    if form == "xyxy":
        x1, y1, x2, y2 = a, b, c, d
    elif form == "xywh":
        x1, y1, x2, y2 = a, b, a + c, b + d
    else:
        x1, y1, x2, y2 = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    if x2 <= x1 or y2 <= y1 or min(x1, y1) < -slack:
        return False
    return size is None or (x2 <= size[0] + slack and y2 <= size[1] + slack)


def _near(first: float, second: float) -> bool:
    return abs(first - second) <= 0.01 * second


def decide_numbers(reader: PictureSet, option: Any) -> tuple[BoxForm, bool]:
    """Find out what the boxes of a data set's numbers are, and whether they are fractions.

    Args:
        reader: The data set.
        option: The form if it was given, or "auto".

    Raises:
        ValueError: It cannot be decided.
    """
    vote = BoxVote()
    for key in reader.keys():  # noqa: SIM118  a sequence, not a dict
        try:
            entry = reader.entry(key, _ignore)
        except (OSError, ValueError):
            # Reading the rows reports this picture.
            continue
        if entry is None or not entry.marks:
            continue
        size = _size_of(entry)
        for mark in entry.marks:
            vote.add(mark.box, size, mark.area)
        if vote.boxes >= _ENOUGH and (option != "auto" or len(vote.possible()) == 1):
            break
    return vote.decide(option, printable(reader.base))


def _size_of(entry: PictureEntry) -> tuple[float, float] | None:
    try:
        if entry.size is not None:
            return float(entry.size[0]), float(entry.size[1])
        (width, height), orientation = read_header(entry.picture)
    except (OSError, TypeError, ValueError):
        return None
    return (height, width) if orientation > 4 else (width, height)


def _ignore(kind: str, example: str) -> None:
    """Leave a fault to the reading of the rows."""
