"""A list of finished images beside the report, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def file_stamp(source: str) -> list[int] | None:
    """Return size and time of change of a file, which show whether it is still the one that was processed.

    Args:
        source: Path or web address.

    Returns:
        Bytes and nanoseconds; None for a web address.
    """
    try:
        stat = Path(source).stat()
    except (OSError, ValueError):
        return None
    return [stat.st_size, stat.st_mtime_ns]


def folder_stamp(folder: str) -> dict[str, list[int] | None]:
    """Return `file_stamp` of every file of a model's folder, which show whether it is still the same model.

    Args:
        folder: Path of the folder; a Hub id or another name has no files here.

    Returns:
        Stamps by file name.
    """
    try:
        return {path.name: file_stamp(str(path)) for path in sorted(Path(folder).iterdir()) if path.is_file()}
    except (OSError, ValueError):
        return {}


class ProgressFile:
    """A JSON Lines file: the settings of the run, then a line for each finished image, written when it is finished.

    Args:
        path: Path of the file.
        settings: Settings of this run; an earlier run with others is not continued.

    Attributes:
        had_other_settings: Whether the file holds an unfinished run with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        # As JSON gives them back, so that equal settings compare equal.
        self._settings = json.loads(json.dumps(settings))
        self._file: Any = None
        self._done, self._end = self._read()
        self.had_other_settings = self._end == 0 and path.is_file()

    def _read(self) -> tuple[dict[str, dict[str, Any]], int]:
        """Return the finished images by source, and the number of bytes that are whole lines of this run."""
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except OSError:
            return {}, 0
        done: dict[str, dict[str, Any]] = {}
        end = 0
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
            except (RecursionError, ValueError):
                entry = None
            # The last line is broken if the process was killed while writing it, or the disk was full.
            if not isinstance(entry, dict) or not line.endswith(b"\n"):
                break
            if number == 0:
                if entry.get("settings") != self._settings:
                    return {}, 0
            elif isinstance(entry.get("result"), dict) and isinstance(entry["result"].get("image"), str):
                done[entry["result"]["image"]] = entry
            end += len(line)
        return done, end

    def result(self, source: str) -> dict[str, Any] | None:
        """Return the result of an image that is finished, if neither it nor its annotated picture changed since.

        Args:
            source: Path or address of the image.
        """
        entry = self._done.get(source)
        if entry is None or entry.get("stamp") != file_stamp(source):
            return None
        result: dict[str, Any] = entry["result"]
        return result if Path(str(result.get("annotated"))).is_file() else None

    def forget(self) -> None:
        """Start from zero."""
        self._done, self._end, self.had_other_settings = {}, 0, False

    def add(self, result: dict[str, Any], stamp: list[int] | None) -> None:
        """Append a finished image.

        Args:
            result: Result with "image", its path or address.
            stamp: `file_stamp` of the image before it was read.

        Raises:
            OSError: The file cannot be written.
        """
        if self._file is None:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  closed by `close`
            self._file.truncate(self._end)
            if not self._end:
                self._append({"settings": self._settings})
        self._append({"result": result, "stamp": stamp})

    def _append(self, entry: dict[str, Any]) -> None:
        # ASCII: a file name that is not UTF-8 is written with JSON escapes.
        line = json.dumps(entry).encode("ascii") + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(28, "No space left on device", str(self.path))

    def close(self, finished: bool) -> None:
        """Close the file, and remove it if the run is finished."""
        if self._file is not None:
            self._file.close()
        if finished:
            self.path.unlink(missing_ok=True)
