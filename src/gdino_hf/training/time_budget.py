"""A time budget for training, counted over resumed runs, and a learning rate schedule that follows it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

TIME_FILE = "clock.json"

# The stock schedules count steps; a time budget is mapped onto this many of them.
SCHEDULE_STEPS = 10_000


class TimeBudget:
    """Time spent in training, with or without a limit.

    Attributes:
        fraction: Share of the budget used at the last `tick`, in [0, 1]; 0 without a limit.

    Args:
        minutes: The budget in minutes; None for no limit.

    Raises:
        ValueError: The budget is not above 0.
    """

    def __init__(self, minutes: float | None = None) -> None:
        if minutes is not None and minutes <= 0:
            raise ValueError(f"minutes must be above 0, got {minutes}.")
        self.limit = None if minutes is None else 60.0 * minutes
        self.earlier = 0.0
        self.started: float | None = None
        self.fraction = 0.0

    def start(self) -> None:
        """Start or restart the clock; time spent in earlier runs stays counted."""
        self.earlier, self.started = self.seconds, time.monotonic()
        self.tick()

    @property
    def seconds(self) -> float:
        """Seconds spent so far, in this run and earlier ones."""
        return self.earlier + (0.0 if self.started is None else time.monotonic() - self.started)

    def tick(self, seconds: float | None = None) -> None:
        """Update `fraction`; called once per step.

        Args:
            seconds: Time spent that all processes agreed on; by default what this process's clock says.
        """
        if self.limit is not None:
            self.fraction = min(1.0, (self.seconds if seconds is None else seconds) / self.limit)

    def save(self, folder: Path) -> None:
        """Write the time spent into a checkpoint folder."""
        (folder / TIME_FILE).write_text(json.dumps({"seconds": self.seconds}) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read the time spent from a checkpoint folder; a checkpoint without it changes nothing."""
        path = folder / TIME_FILE
        if path.is_file():
            self.earlier, self.started = float(json.loads(path.read_text(encoding="utf-8"))["seconds"]), None
            self.tick()


def follow_time(budget: TimeBudget, schedule: Callable[[int], float], max_steps: int) -> Callable[[int], float]:
    """Make a learning rate schedule follow the time budget, or the steps if those will end first.

    Args:
        budget: A time budget with a limit.
        schedule: Factor on the learning rate after a number of steps, out of `SCHEDULE_STEPS`.
        max_steps: Number of steps that ends the training even if time is left.

    Returns:
        Factor on the learning rate now, as a function of the steps done.
    """
    return lambda step: schedule(round(min(1.0, max(budget.fraction, step / max_steps)) * SCHEDULE_STEPS))
