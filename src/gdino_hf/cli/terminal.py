"""Streams of the command that pass no control characters of file names, labels or messages on to the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gdino_hf.model.printable import printable_lines


class EscapingStream:
    """A text stream that writes control characters as escapes; otherwise it is the stream it is made of.

    Args:
        stream: The stream to write to.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text.

        Args:
            text: The text.

        Returns:
            Its number of characters.
        """
        self._stream.write(printable_lines(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write pieces of text.

        Args:
            lines: The pieces.
        """
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def safe_terminal() -> Iterator[None]:
    """Replace stdout and stderr by streams that escape control characters, and put them back afterwards.

    A stream that the caller closed is replaced by the null device. Whatever prints, be it a progress bar, a logger or
    Python's own warnings, can then not move the cursor, set the window's title or clear the screen with a file's name.
    """
    # If the caller closed a stream, Python sets it to None.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  as long-lived as the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    before = sys.stdout, sys.stderr
    if hasattr(sys.stdout, "reconfigure"):
        # Characters that the terminal's encoding lacks are printed as escapes.
        sys.stdout.reconfigure(errors="backslashreplace")
    after: Any = EscapingStream(sys.stdout), EscapingStream(sys.stderr)
    sys.stdout, sys.stderr = after
    try:
        yield
    finally:
        # Not if someone else replaced them meanwhile.
        sys.stdout = before[0] if sys.stdout is after[0] else sys.stdout
        sys.stderr = before[1] if sys.stderr is after[1] else sys.stderr
