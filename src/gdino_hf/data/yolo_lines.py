"""The lines of YOLO label files: a class number with a box or an outline, in fractions of the picture."""

from __future__ import annotations

from dataclasses import dataclass

from ..model.printable import printable

# Numbers of a box, of which a fifth is its score.
_BOX, _WITH_SCORE = 4, 5
# Numbers of the smallest outline.
_TRIANGLE = 6
_LINES_LOOKED_AT = 3


@dataclass(frozen=True)
class YoloLine:
    """A line of a label file.

    Attributes:
        number: Class number.
        box: Center x, center y, width and height in fractions; None if there is an outline.
        outline: x and y of each corner in fractions; None if there is a box.
        score: The score; None if the line has none.
    """

    number: int
    box: list[float] | None = None
    outline: list[float] | None = None
    score: float | None = None


def parse_yolo_line(line: str, keypoints: int = 0, outline_scores: bool = False) -> YoloLine | None:
    """Parse a line.

    Args:
        line: The line.
        keypoints: Number of values of keypoints that follow the box in every line, which are left out.
        outline_scores: Whether an odd number after the corners of an outline is its score, as in predictions, and no
            corner that lost its y.

    Returns:
        The class with a box or an outline, each with or without a score; None for a blank line.

    Raises:
        ValueError: It is neither of these.
    """
    words = line.split()
    if not words:
        return None
    try:
        number = float(words[0])
        values = [float(word) for word in words[1:]]
    except ValueError:
        number, values = -1.0, []
    # Some tools write class numbers as 0.0.
    if number >= 0 and number == int(number):
        if keypoints and len(values) == _BOX + keypoints:
            values = values[:_BOX]
        if len(values) in (_BOX, _WITH_SCORE):
            return YoloLine(int(number), values[:_BOX], score=values[_BOX] if len(values) == _WITH_SCORE else None)
        if len(values) >= _TRIANGLE and len(values) % 2 == 0:
            return YoloLine(int(number), outline=values)
        if outline_scores and len(values) > _TRIANGLE:
            return YoloLine(int(number), outline=values[:-1], score=values[-1])
    raise ValueError(
        f"the line {printable(line.strip(), 80)!r} is not a class number with x, y, width and height, or with the "
        "corners of an outline"
    )


def is_yolo_text(text: str) -> bool:
    """Return whether the first lines of a text are those of a label file: class numbers and fractions."""
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        parsed = [parse_yolo_line(line) for line in lines[:_LINES_LOOKED_AT]]
    except ValueError:
        return False
    numbers = [number for line in parsed if line is not None for number in (line.box or line.outline or ())]
    return bool(numbers) and all(-0.1 <= number <= 1.1 for number in numbers)
