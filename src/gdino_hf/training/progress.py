"""Training output: one short line per log on the terminal, and every logged value in a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from ..whole_files import write_whole_text

_SHOWN = ("loss", "learning_rate", "eval_AP", "eval_AP50", "train_loss")


def log_line(step: int, logs: Mapping[str, Any] | None) -> str:
    """Format the metrics worth watching as one line; empty if there are none.

    Args:
        step: Number of optimizer steps so far.
        logs: Values that Trainer logged, by name.

    Returns:
        A line such as "step 20: loss 9.3, learning_rate 0.0001".
    """
    shown = [f"{name} {value:.4g}" for name in _SHOWN if (value := (logs or {}).get(name)) is not None]
    return f"step {step}: {', '.join(shown)}" if shown else ""


class ShortProgress(ProgressCallback):
    """The stock progress bar with one short line per log, in place of a dictionary with every loss term."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the progress bar, without a total where a time budget ends the training."""
        super().on_train_begin(args, state, control, **kwargs)
        if args.minutes is not None and self.training_bar is not None:
            self.training_bar.total = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the line above the progress bar."""
        line = log_line(state.global_step, logs)
        if line and self.training_bar is not None:
            self.training_bar.write(line)


class ShortLog(TrainerCallback):
    """One short line per log where no progress bar is wanted."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the line."""
        line = log_line(state.global_step, logs)
        if line and state.is_world_process_zero:
            print(line, flush=True)


class JsonLog(TrainerCallback):
    """Append everything that is logged to a file, one JSON object per line.

    Args:
        path: The file; a resumed training continues it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take out what a killed run logged after the checkpoint that training resumes from; it is logged again."""
        if state.is_world_process_zero and self.path.exists():
            known = [{"step": entry["step"], **entry} for entry in state.log_history]
            write_whole_text(self.path, "".join(json.dumps(entry) + "\n" for entry in known))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Append a line."""
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")
