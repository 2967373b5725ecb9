"""A JSON report that is rewritten at intervals during a long run, so that a killed process loses little."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from gdino_hf.whole_files import check_writable, write_whole_text

WRITE_EVERY_SECONDS = 10.0
"""Seconds between writes: at most this much work is lost if the process is killed."""

# Writing a report of a hundred thousand images takes seconds; this limits the share of time spent on it.
_LARGEST_SHARE_OF_TIME = 0.05


class ReportFile:
    """A JSON file that always holds a complete report; an earlier report is kept until the first write.

    Args:
        path: Path of the file; its folder is made if it is missing.

    Raises:
        OSError: The path cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_writable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._due = time.monotonic() + WRITE_EVERY_SECONDS

    def write(self, report: dict[str, Any]) -> None:
        """Write the report under another name, then rename it, so a reader never sees half a report.

        Args:
            report: JSON-serializable results.

        Raises:
            OSError: The report cannot be written; the file is unchanged.
        """
        text = json.dumps(report, ensure_ascii=False, indent=2) + "\n"
        write_whole_text(self.path, text)

    def write_if_due(self, report: dict[str, Any]) -> None:
        """Write the report if the last write was long enough ago.

        Args:
            report: JSON-serializable results so far.
        """
        begin = time.monotonic()
        if begin < self._due:
            return
        # A disk that is full now may have room at the end; only the last write reports an error.
        with contextlib.suppress(OSError):
            self.write(report)
        end = time.monotonic()
        self._due = end + max(WRITE_EVERY_SECONDS, (end - begin) / _LARGEST_SHARE_OF_TIME)
