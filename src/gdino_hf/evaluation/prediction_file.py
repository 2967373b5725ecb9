"""Predictions on disk, written while a model runs: a header line and one line of JSON per image."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from ..error_text import reason
from ..model.printable import printable
from ..model.text_prompt import shorten

FORMAT = "gdino-predictions"
VERSION = 1
_ARRAYS = {"boxes": (-1, 4), "scores": (-1,)}


@dataclass
class Predictions:
    """Predictions of a model over a data set.

    Attributes:
        header: Settings they were made with: "model", "labels" and whatever else was recorded.
        images: One dict per image with "image_id", "width", "height", "boxes" (N, 4) xyxy in pixels, "scores" (N,) and
            "labels" (N,), best first; for captions, see `predict_phrases`.
        failed: {"image_id", "error"} of each image that could not be used.
    """

    header: dict[str, Any] = field(default_factory=dict)
    images: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)


class PredictionStore(Protocol):
    """Where predictions are kept as they are made.

    Attributes:
        header: Settings they are made with.
        earlier: Predictions that it already holds.
    """

    header: dict[str, Any]
    earlier: Predictions

    def append(self, prediction: Mapping[str, Any]) -> None:
        """Keep the predictions or the failure of one image."""


class PredictionLines:
    """Predictions in memory, as the lines that a `PredictionFile` has for them."""

    def __init__(self) -> None:
        self.header: dict[str, Any] = {}
        self.earlier = Predictions()
        self._lines: list[str] = []

    def append(self, prediction: Mapping[str, Any]) -> None:
        """Keep the predictions or the failure of one image."""
        self._lines.append(_line(_to_json(prediction)))

    def content(self) -> bytes:
        """Return the lines of a file."""
        return "".join(self._lines).encode()


class PredictionFile:
    """A file that predictions are appended to; opened again with the same header, it continues where it stopped.

    Args:
        path: The file. Its folder is created.
        header: Settings the predictions are made with. An existing file must have the same header.

    Attributes:
        header: The header in the form in which it is read back from the file.
        earlier: Predictions that the file already held when it was opened.

    Raises:
        OSError: The file cannot be written.
        ValueError: The file exists, and is not a prediction file or has another header.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.earlier = Predictions()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The round trip through JSON turns tuples into lists, so that it compares equal with a header from a file.
        self.header = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **header}))
        if self.path.exists() and self.path.stat().st_size:
            self._cut_to_whole_lines()
            self.earlier = read_predictions(self.path)
            differing = [name for name in self.header if self.earlier.header.get(name) != self.header[name]]
            if differing:
                name = differing[0]
                was, now = shorten(self.earlier.header.get(name), 60), shorten(self.header[name], 60)
                raise ValueError(
                    f"{printable(self.path)} was started with another {name} "
                    f"({was}, not {now}); use the same one, or write to another file."
                )
        self._file = self.path.open("a", encoding="utf-8")
        if not self.earlier.header:
            self._write(self.header)

    def __enter__(self) -> PredictionFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, prediction: Mapping[str, Any]) -> None:
        """Append the predictions or the failure of one image.

        Args:
            prediction: An entry of `Predictions.images` or `Predictions.failed`.

        Raises:
            OSError: The file cannot be written; earlier entries remain.
        """
        self._write(_to_json(prediction))

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(_line(line))
        # Flushed at once, so that a killed process loses only the images it was working on.
        self._file.flush()

    def _cut_to_whole_lines(self) -> None:
        """Remove an incomplete last line, left by a process that was killed while writing."""
        with self.path.open("rb") as file:
            whole = sum(len(line) for line in file if line.endswith(b"\n"))
        os.truncate(self.path, whole)


def read_predictions(path: str | Path) -> Predictions:
    """Read a file written by `PredictionFile`, complete or not.

    Args:
        path: The file.

    Returns:
        The predictions. If an image has several entries, the last one counts.

    Raises:
        ValueError: The file cannot be read or is not a prediction file; the message names the line.
    """
    lines = _whole_lines(path)
    _, header = next(lines, (1, None))
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{printable(path)} is not a prediction file; give a predictions.jsonl written by gdino eval.")
    if header.get("version") != VERSION:
        version = shorten(header.get("version"))
        raise ValueError(f"{printable(path)} has version {version}, but this program reads version {VERSION}.")
    by_image: dict[Any, dict[str, Any]] = {}
    for number, entry in lines:
        try:
            by_image[entry["image_id"]] = entry if "error" in entry else _from_json(entry)
            labels = by_image[entry["image_id"]].get("labels", ())
            if len(labels) and not 0 <= min(labels) <= max(labels) < len(header.get("labels", ())):
                raise ValueError(f"a label is outside the {len(header.get('labels', ()))} labels of its header")
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, number, error) from error
    return Predictions(
        header=header,
        images=[entry for entry in by_image.values() if "error" not in entry],
        failed=[entry for entry in by_image.values() if "error" in entry],
    )


def _whole_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and content of each complete line; an incomplete last line is ignored.

    Raises:
        ValueError: The file cannot be read, or a line is not valid JSON.
    """
    number = 0
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith("\n"):
                    yield number, json.loads(line)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{printable(path)} cannot be read as predictions ({reason(error)}).") from error
    except (RecursionError, ValueError) as error:
        raise _damaged(path, number, error) from error


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=True) + "\n"


def _to_json(value: Any) -> Any:
    """Convert to plain lists and numbers; nine digits preserve a float32 exactly."""
    if isinstance(value, Mapping):
        return {name: _to_json(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def _from_json(entry: dict[str, Any]) -> dict[str, Any]:
    result = dict(entry)
    for name, shape in _ARRAYS.items():
        if name in entry:
            result[name] = np.array(entry[name], dtype=np.float32).astype(np.float64).reshape(shape)
    if "labels" in entry:
        result["labels"] = np.array(entry["labels"], dtype=np.int64)
    if "phrases" in entry:
        result["phrases"] = [_from_json(phrase) for phrase in entry["phrases"]]
    return result


def _damaged(path: str | Path, number: int, error: Exception) -> ValueError:
    return ValueError(f"{printable(path)} is damaged in line {number} ({reason(error)}); make the predictions again.")
