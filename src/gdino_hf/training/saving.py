"""Checkpoints that are complete or absent: each is written under a temporary name and then renamed.

The previous checkpoint is deleted only after the rename, so a killed process always leaves a complete one.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..error_text import reason
from ..whole_files import flush

UNFINISHED = "unfinished"
# A disk with fewer free bytes than this is full: no checkpoint is that small.
_FULL = 2**20
_STATE_FILE = "trainer_state.json"


class SavingError(OSError):
    """A checkpoint could not be written; the message gives the reason and the last complete checkpoint."""


class SaveEvery(TrainerCallback):
    """Save a checkpoint whenever some time has passed since the last one, however long a step takes.

    Args:
        seconds: Time between two checkpoints.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._saved_at = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count from the beginning of this run."""
        self._saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint if one is due."""
        if time.monotonic() - self._saved_at > self.seconds:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count from the checkpoint that was just written."""
        self._saved_at = time.monotonic()


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run.

    Args:
        folder: The run's folder.

    Returns:
        The checkpoint's folder; None if there is none.
    """
    found = [
        path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.split("-")[-1].isdigit() and (path / _STATE_FILE).is_file()
    ]
    return max(found, key=lambda path: int(path.name.split("-")[-1]), default=None)


@contextmanager
def saving(run: Path) -> Iterator[Path]:
    """Provide a folder to write a checkpoint in; if writing fails, finished checkpoints stay untouched.

    Args:
        run: The run's folder.

    Yields:
        The folder to write in.

    Raises:
        SavingError: The checkpoint cannot be written.
    """
    from safetensors import SafetensorError

    unfinished = run / UNFINISHED
    try:
        yield unfinished
    # A full disk is an OSError to Python, a SafetensorError to safetensors and a RuntimeError to torch.save.
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = reason(error)
        if shutil.disk_usage(run).free < _FULL:
            # torch.save's own message would only mention file positions.
            cause = "no space is left on the device"
        shutil.rmtree(unfinished, ignore_errors=True)
        last = last_checkpoint(run)
        left = f"{last} is complete" if last is not None else "there is no earlier one"
        raise SavingError(
            f"The checkpoint cannot be written to {run} ({cause}); {left}: free some space and continue with "
            f"--resume {run}."
        ) from error


def publish(run: Path, step: int, state: TrainerState, save_total_limit: int | None) -> Path:
    """Rename a written checkpoint to its final name, then delete the oldest ones.

    Args:
        run: The run's folder, with the written checkpoint in its `UNFINISHED` folder.
        step: Step of the checkpoint.
        state: State of the training, which names the best checkpoint.
        save_total_limit: Number of checkpoints to keep; None for all.

    Returns:
        The checkpoint's folder.
    """
    name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
    written, final = run / UNFINISHED / name, run / name
    if state.best_global_step:
        best = run / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        state.best_model_checkpoint = str(best) if best.is_dir() or best == final else None
        state.save_to_json(str(written / _STATE_FILE))
    for path in written.iterdir():
        flush(path)
    if final.exists():
        # The step was saved before, for example by a resumed run with nothing left to do: move that one out of the way.
        shutil.rmtree(run / UNFINISHED / "old", ignore_errors=True)
        final.rename(run / UNFINISHED / "old")
    written.rename(final)
    flush(run)
    shutil.rmtree(run / UNFINISHED, ignore_errors=True)
    rotate_checkpoints(
        output_dir=str(run), save_total_limit=save_total_limit, best_model_checkpoint=state.best_model_checkpoint
    )
    return final
