"""What the training recipes share: learning rate schedule, EMA, checkpoints, resuming and the log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..training.arguments import GDinoTrainingArguments
from ..training.progress import JsonLog
from ..training.saving import SaveEvery, last_checkpoint
from ..training.time_budget import SCHEDULE_STEPS
from ..training.trainer import GDinoTrainer

SECONDS_BETWEEN_CHECKPOINTS = 240.0
# A step limit so high that the time budget always ends the run first.
UNLIMITED_STEPS = 10**7


def training_arguments(output: str | Path, *, minutes: float | None, **options: Any) -> GDinoTrainingArguments:
    """Return the recipes' training options.

    The learning rate rises over the first 2 % of the time budget, stays level until half of it, and falls linearly to
    a fiftieth of its peak. Weights are averaged (EMA 0.998). Checkpoints are written by time, see `train_to_the_end`.

    Args:
        output: Folder of checkpoints and log.
        minutes: Time budget over all runs with this folder; None if `max_steps` among the options ends the training.
        **options: Further fields of `GDinoTrainingArguments`.

    Returns:
        The options.
    """
    shared: dict[str, Any] = {
        "output_dir": str(output),
        "minutes": minutes,
        "max_steps": UNLIMITED_STEPS,
        # One kernel for all parameters: on a CPU, hundreds of small tensors cost more in overhead than in arithmetic.
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": 0.02,
        "lr_scheduler_kwargs": {
            "num_decay_steps": SCHEDULE_STEPS // 2,
            "min_lr_ratio": 0.02,
            "decay_type": "linear",
        },
        "ema_decay": 0.998,
        "logging_steps": 25,
        "save_strategy": "steps",
        "save_steps": UNLIMITED_STEPS,
        "save_total_limit": 2,
        "report_to": [],
        "disable_tqdm": True,
    }
    return GDinoTrainingArguments(**{**shared, **options})


def train_to_the_end(trainer: GDinoTrainer) -> tuple[int, float]:
    """Train, or resume from the last checkpoint, until the budget is used up; the model gets the averaged weights.

    A checkpoint is written every four minutes and at the end, and log.jsonl gets one line per 25 steps. If the budget
    was used up by an earlier run, nothing is trained.

    Args:
        trainer: The recipe's trainer.

    Returns:
        Steps and minutes of training, over all runs.
    """
    output = Path(trainer.args.output_dir)
    trainer.add_callback(JsonLog(output / "log.jsonl"))
    trainer.add_callback(SaveEvery(SECONDS_BETWEEN_CHECKPOINTS))
    last = last_checkpoint(output)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    minutes = trainer.time_budget.seconds / 60
    trainer.copy_ema_to_model()
    trainer.model.eval()
    return trainer.state.global_step, minutes


def write_figures(output: str | Path, figures: Mapping[str, Any]) -> None:
    """Write a recipe's metrics to figures.json in its output folder."""
    (Path(output) / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
