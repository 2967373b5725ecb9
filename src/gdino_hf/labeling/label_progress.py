"""What the user sees while a run works: a line that is rewritten in a terminal, and a line now and then in a pipe."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..model.printable import printable
from .label_workers import Tally

PIPE_SECONDS = 10.0
"""Seconds between two lines if the output is no terminal."""

_TERMINAL_SECONDS = 0.5
# Seconds over which the speed is measured.
_WINDOW = 60.0


class LabelProgress:
    """Counts pictures and shows their number, the speed, finds, failures and the time left.

    Args:
        stream: Text stream to write to; None shows nothing.
        seconds: Seconds between two lines; None for those of a terminal or a pipe.
        clock: Function that returns seconds.
    """

    def __init__(
        self, stream: Any = None, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream, self._clock = stream, clock
        self._is_terminal = stream is not None and stream.isatty()
        self._seconds = seconds if seconds is not None else _TERMINAL_SECONDS if self._is_terminal else PIPE_SECONDS
        self.done = Tally()
        """What is done, with earlier runs."""
        self.total: int | None = None
        """Number of pictures of the whole run; None while they are being counted."""
        self._planned = 0
        self._shown_at = clock()
        self._history: deque[tuple[float, int]] = deque()
        self._width = 0

    def resume(self, done: Tally) -> None:
        """Count what earlier runs have done."""
        self.done += done
        self._history.clear()

    def plan(self, pictures: int, ended: bool) -> None:
        """Tell how many pictures there are, and whether these are all."""
        self._planned, self.total = pictures, pictures if ended else None

    def add(self, tally: Tally) -> None:
        """Count what was done, and show it if it is time."""
        self.done += tally
        now = self._clock()
        if tally.pictures:
            # The speed counts from the first pictures on, not from the start of loading the model.
            self._history.append((now, self.done.pictures))
            while now - self._history[0][0] > _WINDOW and len(self._history) > 2:
                self._history.popleft()
        if now - self._shown_at >= self._seconds:
            self._shown_at = now
            self.show()

    def speed(self) -> float | None:
        """Return pictures in a second over the last minute; None if it is not known yet."""
        if len(self._history) < 2:
            return None
        (begin, first), (end, last) = self._history[0], self._history[-1]
        return (last - first) / (end - begin) if end > begin and last > first else None

    def line(self) -> str:
        """Return the line to show."""
        done, total, speed = self.done, self.total, self.speed()
        if total is None:
            parts = [f"{done.pictures:,} of {self._planned:,} pictures so far"]
        else:
            share = f" ({100 * done.pictures // total} %)" if total else ""
            parts = [f"{done.pictures:,} of {total:,} pictures{share}"]
        if speed is not None:
            parts.append(f"{speed:.1f} images/s")
        parts += [f"{done.boxes:,} finds", f"{done.failed:,} failures"]
        if speed is not None and total is not None and total > done.pictures:
            parts.append(f"{duration((total - done.pictures) / speed)} left")
        return ", ".join(parts)

    def show(self) -> None:
        """Write the line."""
        self._write(self.line(), stays=not self._is_terminal)

    def say(self, text: str) -> None:
        """Write a line of text that stays."""
        self._write(printable(text), stays=True)

    def finish(self) -> None:
        """Write the last state as a line that stays."""
        self._write(self.line(), stays=True)

    def _write(self, text: str, stays: bool) -> None:
        if self._stream is None:
            return
        text = f"label: {text}"
        if not self._is_terminal:
            self._stream.write(text + "\n")
        else:
            # The rest of a longer line before is overwritten with blanks.
            self._stream.write("\r" + text.ljust(self._width) + ("\n" if stays else ""))
            self._width = 0 if stays else len(text)
        self._stream.flush()


def duration(seconds: float) -> str:
    """Return a time in its two largest units, such as "2 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    if hours == 0:
        return f"{minutes} min {rest} s" if minutes < 10 else f"{minutes} min"
    days, hours_left = divmod(hours, 24)
    return f"{hours} h {minutes_left} min" if days == 0 else f"{days} d {hours_left} h"
