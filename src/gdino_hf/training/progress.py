"""One short line per log, above a progress bar or without one, in place of the dictionary of every part of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import ProgressCallback, TrainerCallback

_SHOWN = ("loss", "learning_rate", "eval_AP", "eval_AP50", "train_loss")


def log_line(step: int, logs: Mapping[str, Any] | None) -> str:
    """Of a log what one watches; empty where that is nothing.

    Args:
        step: Steps so far.
        logs: What was logged.

    Returns:
        "step 20: loss 9.3, learning_rate 0.0001".
    """
    shown = [f"{name} {value:.4g}" for name in _SHOWN if (value := (logs or {}).get(name)) is not None]
    return f"step {step}: {', '.join(shown)}" if shown else ""


class ShortProgress(ProgressCallback):
    """The stock progress bar with short lines."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the bar; where time ends the training, nobody knows after how many steps."""
        super().on_train_begin(args, state, control, **kwargs)
        if args.minutes is not None and self.training_bar is not None:
            self.training_bar.total = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the line above the bar."""
        line = log_line(state.global_step, logs)
        if line and self.training_bar is not None:
            self.training_bar.write(line)


class ShortLog(TrainerCallback):
    """The short lines alone."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the line."""
        line = log_line(state.global_step, logs)
        if line and state.is_world_process_zero:
            print(line, flush=True)
