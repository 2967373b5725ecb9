"""What every data set becomes: rows of a picture, its boxes and their names, and how values of files are judged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import UnidentifiedImageError

from ..model.text_prompt import shorten

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

LARGEST_ID = 2**63 - 1
LARGEST_SIDE = 2**31 - 1


def features(captions: bool) -> Features:
    """Columns of a data set.

    Args:
        captions: Whether rows have `caption` and `spans`.

    Returns:
        `image` decoded when a row is read, `image_id`, `width`, `height`, `boxes` (N, 4) xyxy in pixels, `names` (N),
        `crowd` (N), and for grounding `caption` (None on rows without) and `spans`: per box its [start, end) pairs of
        the caption's characters.
    """
    from datasets import Features, Image, List, Value

    columns = {
        "image": Image(),
        "image_id": Value("int64"),
        "width": Value("int32"),
        "height": Value("int32"),
        "boxes": List(List(Value("float32"), length=4)),
        "names": List(Value("string")),
        "crowd": List(Value("bool")),
    }
    if captions:
        columns |= {"caption": Value("string"), "spans": List(List(List(Value("int32"), length=2)))}
    return Features(columns)


def make_dataset(rows: Iterator[dict[str, Any]], captions: bool) -> Dataset:
    """A data set in memory, except for its pictures.

    Args:
        rows: With the path of the picture as "image".
        captions: Whether rows have `caption` and `spans`.

    Returns:
        The data set.
    """
    from datasets import Dataset

    columns = features(captions)
    values: dict[str, list[Any]] = {name: [] for name in columns}
    for row in rows:
        for name, column in values.items():
            column.append(row[name])
    return Dataset.from_dict(values, features=columns)


def make_stream(
    generator: Callable[..., Iterator[dict[str, Any]]], captions: bool, arguments: Mapping[str, Any]
) -> IterableDataset:
    """A data set that is read as it is walked through.

    Args:
        generator: Yields rows with the path of the picture as "image".
        captions: Whether rows have `caption` and `spans`.
        arguments: Of the generator; one that is a list is parted among the workers of a data loader.

    Returns:
        The data set.
    """
    from datasets import IterableDataset

    return IterableDataset.from_generator(generator, features=features(captions), gen_kwargs=dict(arguments))


def read_json(path: str | Path, what: str) -> Any:
    """A file's content.

    Args:
        path: The file.
        what: What it should be, for messages.

    Raises:
        ValueError: It cannot be read or is no json.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as {what} ({reason(error)}).") from error


def reason(error: BaseException) -> str:
    """What went wrong in a line, without the file's path, which messages name themselves, and without a period.

    Args:
        error: Any exception.

    Returns:
        The first line of its message, or its type's name where it has none.
    """
    if isinstance(error, UnidentifiedImageError):
        return "it is no picture"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file system takes names none.

    Args:
        path: Any path.

    Returns:
        True where it can be opened as a file.
    """
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def image_path(folder: str | Path, name: str) -> Path:
    """A photograph's file.

    Args:
        folder: Of the photographs.
        name: What the annotations call it; some tools write the folder's own name before it, or backslashes.

    Returns:
        The file, which need not exist.
    """
    path = Path(folder) / name
    if "\\" in name and not is_file(path):
        return image_path(folder, name.replace("\\", "/"))
    if Path(name).parts[:1] == (Path(folder).name,) and not is_file(path):
        beside = Path(folder).parent / name
        return beside if is_file(beside) else path
    return path


def parse_integer(value: Any, what: str, low: int, high: int = LARGEST_ID) -> int:
    """A whole number out of a file.

    Args:
        value: 3 or 3.0, but not "3" or true.
        what: Its name, for messages.
        low: Least.
        high: Most.

    Returns:
        The number.

    Raises:
        ValueError: It is something else, or not within low..high.
    """
    number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if not number or isinstance(value, bool) or value != int(value) or not low <= value <= high:
        raise ValueError(f"{what} is {shorten(value)}, not a whole number of {low} to {high}")
    return int(value)


def parse_text(value: Any, what: str) -> str:
    """A name out of a file.

    Args:
        value: A string with something in it.
        what: Its name, for messages.

    Returns:
        The string.

    Raises:
        ValueError: It is no string, holds nothing but blanks, or bytes that are no text.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is {shorten(value)}, not a text with something in it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} {shorten(value)} holds characters that are no text") from None
    return value


def parse_box(value: Any, form: str) -> tuple[float, float, float, float]:
    """A box out of a file.

    Args:
        value: Four numbers in pixels.
        form: "xywh" or "xyxy".

    Returns:
        xyxy as annotated, which may leave the picture or have no area.

    Raises:
        ValueError: It is not four finite numbers.
    """
    numbers = (
        isinstance(value, Sequence)
        and len(value) == 4
        and all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in value)
    )
    # Beyond float32 there is no number for a box, and an integer may have a thousand digits.
    if not numbers or not all(abs(number) < 1e30 for number in value):
        raise ValueError(f"the box {shorten(value)} is not four finite numbers {', '.join(form)}")
    x, y, third, fourth = (float(number) for number in value)
    return (x, y, x + third, y + fourth) if form == "xywh" else (x, y, third, fourth)


def clip_box(box: Sequence[float], width: int, height: int) -> list[float] | None:
    """The part of a box inside its picture.

    Args:
        box: xyxy in pixels.
        width, height: Of the picture, in pixels.

    Returns:
        xyxy, or None where no area is left in the float32 that the data set stores.
    """
    inside = [max(0.0, box[0]), max(0.0, box[1]), min(float(width), box[2]), min(float(height), box[3])]
    # Quick, for millions of boxes: float32 tells apart what is further apart than that in any picture.
    if inside[2] - inside[0] > 1 and inside[3] - inside[1] > 1 and max(width, height) < 2**20:
        return inside
    x1, y1, x2, y2 = np.asarray(inside, dtype=np.float32).tolist()
    return inside if x2 > x1 and y2 > y1 else None
