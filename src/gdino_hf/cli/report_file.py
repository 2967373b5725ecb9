"""The JSON file of a verb that works for long, written as the work goes on: a killed process loses little."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

WRITE_EVERY_SECONDS = 10.0
"""Age of the newest results that a killed process loses."""

# A report of a hundred thousand images takes seconds to write; the work comes first.
_LARGEST_SHARE_OF_TIME = 0.05


class ReportFile:
    """A JSON file that holds a whole report at any time; an earlier run's stays until there is a new one.

    Args:
        path: Where it is written; its folder is made.

    Raises:
        OSError: Nothing can be written there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        self._partial.touch()
        self._partial.unlink()
        self._due = time.monotonic() + WRITE_EVERY_SECONDS

    def write(self, report: dict[str, Any]) -> None:
        """Write the whole file or none: a reader never sees half a report.

        Args:
            report: What json takes.

        Raises:
            OSError: It cannot be written; the file is as it was.
        """
        text = json.dumps(report, ensure_ascii=False, indent=2) + "\n"
        # backslashreplace: a file name that is not UTF-8 becomes JSON's own escapes
        self._partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        self._partial.replace(self.path)

    def write_if_due(self, report: dict[str, Any]) -> None:
        """Write what is done so far, if the last time was long enough ago.

        Args:
            report: What json takes.
        """
        begin = time.monotonic()
        if begin < self._due:
            return
        # A disk that is full now may not be at the end, when it is complained of.
        with contextlib.suppress(OSError):
            self.write(report)
        end = time.monotonic()
        self._due = end + max(WRITE_EVERY_SECONDS, (end - begin) / _LARGEST_SHARE_OF_TIME)
