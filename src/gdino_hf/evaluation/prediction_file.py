"""Predictions on disk: a header and a line of JSON per image, written as the work goes on and read without a model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

FORMAT = "gdino-predictions"
VERSION = 1
_ARRAYS = {"boxes": (-1, 4), "scores": (-1,)}


@dataclass
class Predictions:
    """What a model found.

    Attributes:
        header: How it was made: "model", "labels" and whatever else the maker wrote down.
        images: Per image "image_id", "width", "height", "boxes" (N, 4) xyxy in pixels, "scores" (N,), "labels" (N,),
            best first; of captions, see `phrases.py`.
        failed: {"image_id", "error"} of each image that could not be read.
    """

    header: dict[str, Any] = field(default_factory=dict)
    images: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)


class PredictionFile:
    """Appends predictions to a file; opened again with the same header, it knows what is done.

    Args:
        path: The file; its folder is made.
        header: How the predictions are made. A file that exists must have been begun with the same.

    Attributes:
        header: The same as it is read back.
        earlier: What the file had already.

    Raises:
        OSError: It cannot be written.
        ValueError: The file is none of predictions, or was begun with another header.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.earlier = Predictions()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # As it is read back: tuples are lists there.
        self.header = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **header}))
        if self.path.exists() and self.path.stat().st_size:
            self._cut_to_whole_lines()
            self.earlier = read_predictions(self.path)
            differing = [name for name in self.header if self.earlier.header.get(name) != self.header[name]]
            if differing:
                name = differing[0]
                raise ValueError(
                    f"{self.path} was begun with another {name} ({_short(self.earlier.header.get(name))}, not "
                    f"{_short(self.header[name])}); give the same, or begin anew elsewhere."
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
        """Write one image's predictions, or its failure, to the end.

        Args:
            prediction: An entry of `Predictions.images` or `Predictions.failed`.

        Raises:
            OSError: It cannot be written; what was written before stays.
        """
        self._write(_to_json(prediction))

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=True) + "\n")
        # A killed process loses the images it is at, not those before.
        self._file.flush()

    def _cut_to_whole_lines(self) -> None:
        """Drop what a process that was killed while writing left of its last line."""
        with self.path.open("rb") as file:
            whole = sum(len(line) for line in file if line.endswith(b"\n"))
        os.truncate(self.path, whole)


def read_predictions(path: str | Path) -> Predictions:
    """Read what `PredictionFile` wrote, also while it is not finished.

    Args:
        path: The file.

    Returns:
        The predictions; the later entry of an image that has two.

    Raises:
        ValueError: It cannot be read or is no such file; the message names the line.
    """
    lines = _whole_lines(path)
    _, header = next(lines, (1, None))
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} is no file of predictions; give the predictions.jsonl that gdino eval wrote.")
    if header.get("version") != VERSION:
        raise ValueError(f"{path} has version {header.get('version')}, this program reads version {VERSION}.")
    by_image: dict[Any, dict[str, Any]] = {}
    for number, entry in lines:
        try:
            by_image[entry["image_id"]] = entry if "error" in entry else _from_json(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged in line {number} ({error}); make the predictions again.") from error
    return Predictions(
        header=header,
        images=[entry for entry in by_image.values() if "error" not in entry],
        failed=[entry for entry in by_image.values() if "error" in entry],
    )


def _whole_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Number and content of each line; what a killed process never finished is none.

    Raises:
        ValueError: The file cannot be read, or a line is no json.
    """
    number = 0
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith("\n"):
                    yield number, json.loads(line)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as predictions ({error}).") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged in line {number} ({error}); make the predictions again.") from error


def _to_json(value: Any) -> Any:
    """Plain lists; nine digits hold every bit of a float32, which is what models give."""
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


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
