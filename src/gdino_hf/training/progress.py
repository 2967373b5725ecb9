"""A progress bar with one short line per log, in place of the dictionary of every part of the loss."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback

_SHOWN = ("loss", "learning_rate", "eval_AP", "eval_AP50", "train_loss")


class ShortProgress(ProgressCallback):
    """The stock progress bar; a log says its step, and of its numbers those that one watches."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the line above the bar."""
        shown = [f"{name} {logs[name]:.4g}" for name in _SHOWN if name in (logs or {})]
        if state.is_world_process_zero and self.training_bar is not None and shown:
            self.training_bar.write(f"step {state.global_step}: {', '.join(shown)}")
