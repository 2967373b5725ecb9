"""The row format shared by all data sets, and parsing of single values from annotation files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..error_text import reason
from ..model.printable import printable
from ..model.text_prompt import shorten
from .content import BoxForm
from .faults import THIN, Report

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

LARGEST_ID = 2**63 - 1
LARGEST_SIDE = 2**31 - 1
# Characters of the longest number that is read from text.
_LONGEST_NUMBER = 40

# Pixels by which a box may extend beyond its image, for the rounding of annotation tools.
_TOLERANCE = 1.0
# What the four numbers of a box are, for messages.
_NUMBERS = {"xywh": "x, y, w, h", "xyxy": "x, y, x, y", "cxcywh": "center x, center y, w, h"}
# Narrower boxes show nothing.
_THINNEST = 0.5


def features(captions: bool, text_ids: bool = False, absent: bool = False) -> Features:
    """Return the column types of a data set.

    Args:
        captions: Whether rows have `caption` and `spans`.
        text_ids: Whether `image_id` is text instead of an integer.
        absent: Whether rows have `neg_names`.

    Returns:
        `image` (decoded when a row is read), `image_id`, `width`, `height`, `boxes` ((N, 4) xyxy in pixels), `names`
        (N) and `crowd` (N); for grounding also `caption` (None in rows without one) and `spans` (a list of [start, end)
        characters of the caption per box); if images say which names they lack, also `neg_names` (None for an image
        that does not, in which every other name of the data set is absent).
    """
    from datasets import Features, List, Value

    from .picture_column import PictureColumn

    columns = {
        "image": PictureColumn(),
        "image_id": Value("string" if text_ids else "int64"),
        "width": Value("int32"),
        "height": Value("int32"),
        "boxes": List(List(Value("float32"), length=4)),
        "names": List(Value("string")),
        "crowd": List(Value("bool")),
    }
    if captions:
        columns |= {"caption": Value("string"), "spans": List(List(List(Value("int32"), length=2)))}
    if absent:
        columns["neg_names"] = List(Value("string"))
    return Features(columns)


def make_dataset(
    rows: Iterator[dict[str, Any]], captions: bool, text_ids: bool = False, absent: bool = False
) -> Dataset:
    """Build a data set in memory; its images stay on disk.

    Args:
        rows: Rows with the image's path as "image".
        captions: Whether rows have `caption` and `spans`.
        text_ids: Whether `image_id` is text instead of an integer.
        absent: Whether rows have `neg_names`.

    Returns:
        The data set.
    """
    from datasets import Dataset

    columns = features(captions, text_ids, absent)
    values: dict[str, list[Any]] = {name: [] for name in columns}
    for row in rows:
        for name, column in values.items():
            column.append(row[name])
    return Dataset.from_dict(values, features=columns)


def make_stream(
    generator: Callable[..., Iterator[dict[str, Any]]],
    captions: bool,
    arguments: Mapping[str, Any],
    text_ids: bool = False,
    absent: bool = False,
) -> IterableDataset:
    """Build a data set that is read while iterating.

    Args:
        generator: Function that yields rows with the image's path as "image".
        captions: Whether rows have `caption` and `spans`.
        arguments: Keyword arguments of the generator. Lists among them are split among a data loader's workers.
        text_ids: Whether `image_id` is text instead of an integer.
        absent: Whether rows have `neg_names`.

    Returns:
        The data set.
    """
    from datasets import IterableDataset

    columns = features(captions, text_ids, absent)
    return IterableDataset.from_generator(generator, features=columns, gen_kwargs=dict(arguments))


def read_json(path: str | Path, what: str) -> Any:
    """Read a json file.

    Args:
        path: The file.
        what: Description of the expected content, for the error message.

    Returns:
        The parsed content.

    Raises:
        ValueError: The file cannot be read, or is not valid json.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{printable(path)} cannot be read as {what} ({reason(error)}).") from error


def parse_line(line: bytes) -> dict[str, Any]:
    """Parse one line of a json lines file.

    Args:
        line: The line as UTF-8 bytes.

    Returns:
        The parsed dict.

    Raises:
        ValueError: The line is not valid json, or not a dict.
    """
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid json ({reason(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict")
    return content


def is_file(path: Any) -> bool:
    """Return whether a path is an existing file; False, not an exception, for names the file system does not allow.

    Args:
        path: A path, or a `StoredPicture`.

    Returns:
        True if it can be opened as a file.
    """
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def parse_number(value: Any) -> Any:
    """Return a number written as text as a number, and any other value as it is.

    Args:
        value: The value; " 3 " and "3.5" are numbers written as text.
    """
    if not isinstance(value, str) or len(value) > _LONGEST_NUMBER:
        return value
    try:
        return int(value)
    except ValueError:
        pass
    try:
        return float(value)
    except ValueError:
        return value


def parse_integer(value: Any, what: str, low: int, high: int = LARGEST_ID) -> int:
    """Check that a value from a file is a whole number.

    Args:
        value: The value; 3, 3.0 and "3" are whole numbers, true is not.
        what: Description of the value, for the error message.
        low: Smallest allowed number.
        high: Largest allowed number.

    Returns:
        The number.

    Raises:
        ValueError: The value is not a whole number, or is outside low..high.
    """
    value = parse_number(value)
    number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if not number or isinstance(value, bool) or value != int(value) or not low <= value <= high:
        raise ValueError(f"{what} is {shorten(value)}, not a whole number from {low} to {high}")
    return int(value)


def parse_text(value: Any, what: str) -> str:
    """Check that a value from a file is text with at least one visible character.

    Args:
        value: The value.
        what: Description of the value, for the error message.

    Returns:
        The text.

    Raises:
        ValueError: The value is not a string, is blank, or cannot be encoded as UTF-8.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is {shorten(value)}, not a non-empty text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} {shorten(value)} holds characters that are no valid text") from None
    return value


def parse_box(value: Any, form: BoxForm, scale: tuple[float, float] = (1.0, 1.0)) -> tuple[float, float, float, float]:
    """Check that a value from a file is a box.

    Args:
        value: The value, four numbers in pixels, which may be written as text.
        form: Meaning of the numbers: "xywh", "xyxy" or "cxcywh" (center and size).
        scale: Factors of x and y to pixels; the image's size for fractions of it.

    Returns:
        The box as xyxy in pixels. It is not clipped and may have no area.

    Raises:
        ValueError: The value is not four finite numbers.
    """
    given = [parse_number(number) for number in value] if isinstance(value, Sequence) and len(value) == 4 else []
    numbers = given and all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in given)
    # The limit keeps numbers within float32; it also rejects integers of a thousand digits before they are converted.
    if not numbers or not all(abs(number) < 1e30 for number in given):
        raise ValueError(f"the box {shorten(value)} is not four finite numbers {_NUMBERS[form]}")
    x, y, third, fourth = (float(number) * factor for number, factor in zip(given, scale * 2, strict=True))
    if form == "cxcywh":
        return (x - third / 2, y - fourth / 2, x + third / 2, y + fourth / 2)
    return (x, y, x + third, y + fourth) if form == "xywh" else (x, y, third, fourth)


@dataclass
class BoxRange:
    """Collects boxes, to find out whether all of them lie within 0..1 and are therefore fractions of their images."""

    is_within: bool = True
    has_fraction: bool = False

    def add(self, box: Sequence[float]) -> None:
        """Add a box, xyxy as annotated."""
        # Boxes may extend beyond their image by the rounding of tools.
        self.is_within = self.is_within and min(box[0], box[1]) >= -0.02 and max(box[2], box[3]) <= 1.02
        self.has_fraction = self.has_fraction or any(0 < value < 1 for value in box)

    @property
    def is_normalized(self) -> bool:
        """Whether all boxes lie within 0..1 and some number is a fraction."""
        return self.is_within and self.has_fraction


def report_box(box: Sequence[float], width: int, height: int, where: str, report: Report) -> None:
    """Report a box that will be dropped or clipped, except for the rounding of annotation tools, or that is too thin.

    Args:
        box: The box as xyxy in pixels.
        width, height: Size of the image in pixels.
        where: Where the box is, for the report.
        report: Function that faults are passed to.
    """
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        report("boxes without area", f"{where}: {_numbers(box)}")
        return
    inside = clip_box(box, width, height)
    outside = min(x1, y1) < -_TOLERANCE or x2 > width + _TOLERANCE or y2 > height + _TOLERANCE
    if outside or inside is None:
        report("boxes outside", f"{where}: {_numbers(box)} in {width}x{height}")
    if inside is not None and min(inside[2] - inside[0], inside[3] - inside[1]) < _THINNEST:
        report(THIN, f"{where}: {_numbers(box)}")


def _numbers(box: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in box)


def clip_box(box: Sequence[float], width: int, height: int) -> list[float] | None:
    """Clip a box to its image.

    Args:
        box: The box as xyxy in pixels.
        width, height: Size of the image in pixels.

    Returns:
        The clipped box as xyxy, or None if no area is left in float32, the type in which data sets store boxes.
    """
    inside = [max(0.0, box[0]), max(0.0, box[1]), min(float(width), box[2]), min(float(height), box[3])]
    # Shortcut for the usual case: a side above one pixel cannot vanish in float32 in an image of this size.
    if inside[2] - inside[0] > 1 and inside[3] - inside[1] > 1 and max(width, height) < 2**20:
        return inside
    x1, y1, x2, y2 = np.asarray(inside, dtype=np.float32).tolist()
    return inside if x2 > x1 and y2 > y1 else None
