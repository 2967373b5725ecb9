"""Sums of the losses since training began, kept in checkpoints, so that a resumed run reports those of all steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

LOSSES_FILE = "losses.json"


class LossRecord:
    """What Trainer adds up between two logs and over the whole run, of which its own checkpoints keep nothing.

    Attributes:
        stored: What the checkpoint held that training resumes from; None at the beginning.
        is_complete: Whether the sums cover all steps.
    """

    def __init__(self) -> None:
        self.stored: dict[str, Any] | None = None
        self.is_complete = False

    @staticmethod
    def content(trainer: Any) -> dict[str, Any]:
        """Return the sums of a trainer, equal in every process; all processes must call this.

        Args:
            trainer: A GDinoTrainer within `train()`.
        """
        pending = trainer.accelerator.reduce(trainer._tr_loss.detach().clone(), reduction="mean")
        terms = {name: float(value) for name, value in trainer.loss_terms.items()}
        return {
            "total": trainer._total_loss_scalar,
            "pending": pending.item(),
            "logged_at": trainer._globalstep_last_logged,
            "terms": mean_of_processes(terms),
            "num_losses": trainer.num_losses,
        }

    @staticmethod
    def save(content: dict[str, Any], folder: Path) -> None:
        """Write the sums into a checkpoint folder."""
        (folder / LOSSES_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read the sums from a checkpoint folder; one without them leaves the losses of earlier steps out."""
        path = folder / LOSSES_FILE
        self.stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def restore(self, trainer: Any) -> None:
        """Continue a trainer's sums where the checkpoint left them; called when training has begun.

        Args:
            trainer: A GDinoTrainer whose state is that of the checkpoint.
        """
        stored, self.stored = self.stored, None
        self.is_complete = stored is not None or trainer.state.global_step == 0
        if stored is None:
            return
        trainer._total_loss_scalar = stored["total"]
        trainer._tr_loss = torch.tensor(stored["pending"], device=trainer.args.device)
        trainer._globalstep_last_logged = stored["logged_at"]
        device = trainer.args.device
        trainer.loss_terms = {name: torch.tensor(value, device=device) for name, value in stored["terms"].items()}
        trainer.num_losses = stored["num_losses"]


def mean_of_processes(terms: Mapping[str, float]) -> dict[str, float]:
    """Return the mean over all processes of each value; a process without it counts as 0.

    Args:
        terms: Values of this process. A process whose batches had no box has no denoising terms, so the names of the
            processes may differ.
    """
    everywhere = gather_object([dict(terms)])
    names = sorted({name for each in everywhere for name in each})
    return {name: sum(each.get(name, 0.0) for each in everywhere) / len(everywhere) for name in names}
