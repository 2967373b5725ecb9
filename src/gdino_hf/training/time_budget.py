"""A limit of time on a training, over all the runs it takes, and a learning rate that follows it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

CLOCK_FILE = "clock.json"

# The stock schedules count steps; time is told to them in this many.
_TICKS = 10_000


class Clock:
    """Seconds spent in training.

    Attributes:
        fraction: Spent at the last tick, as a part of the limit, at most 1; 0 without a limit.

    Args:
        minutes: The limit; None for no limit.

    Raises:
        ValueError: The limit is not above 0.
    """

    def __init__(self, minutes: float | None = None) -> None:
        if minutes is not None and minutes <= 0:
            raise ValueError(f"minutes must be above 0, got {minutes}.")
        self.limit = None if minutes is None else 60.0 * minutes
        self.before = 0.0
        self.started: float | None = None
        self.fraction = 0.0

    def start(self) -> None:
        """Training begins, or goes on."""
        self.before, self.started = self.seconds, time.monotonic()
        self.tick()

    @property
    def seconds(self) -> float:
        """Spent so far."""
        return self.before + (0.0 if self.started is None else time.monotonic() - self.started)

    def tick(self, seconds: float | None = None) -> None:
        """Read the clock, once per step.

        Args:
            seconds: What the first of several processes read, so that all of them agree; None reads this one.
        """
        if self.limit is not None:
            self.fraction = min(1.0, (self.seconds if seconds is None else seconds) / self.limit)

    def save(self, folder: Path) -> None:
        """Write the time beside a checkpoint."""
        (folder / CLOCK_FILE).write_text(json.dumps({"seconds": self.seconds}) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Go on from the time beside a checkpoint, if there is one."""
        path = folder / CLOCK_FILE
        if path.is_file():
            self.before, self.started = float(json.loads(path.read_text(encoding="utf-8"))["seconds"]), None
            self.tick()


def by_time(clock: Clock, schedule: Callable[[int], float], most_steps: int) -> Callable[[int], float]:
    """A factor on the learning rate that follows the clock, or the steps where these are nearer their end.

    Args:
        clock: With a limit.
        schedule: Factor after so many of `ticks()` steps.
        most_steps: Steps that end the training before its time.

    Returns:
        The factor after so many steps, now.
    """
    return lambda step: schedule(round(min(1.0, max(clock.fraction, step / most_steps)) * _TICKS))


def ticks() -> int:
    """Steps that a schedule handed to `by_time` is laid out for."""
    return _TICKS
