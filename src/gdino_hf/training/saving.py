"""Checkpoints that are whole or not there: written under another name, then renamed, the old one kept till then."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

UNFINISHED = "unfinished"
# Bytes that no checkpoint fits in.
_FULL = 2**20
_STATE_FILE = "trainer_state.json"


class SavingError(OSError):
    """A checkpoint cannot be written: the message says why and what is left."""


def last_checkpoint(folder: Path, last_file: str = _STATE_FILE) -> Path | None:
    """The newest whole checkpoint of a run.

    Args:
        folder: The run's folder.
        last_file: What is written last, without which a checkpoint is not whole.

    Returns:
        The checkpoint's folder, None where there is none.
    """
    found = [
        path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.split("-")[-1].isdigit() and (path / last_file).is_file()
    ]
    return max(found, key=lambda path: int(path.name.split("-")[-1]), default=None)


@contextmanager
def saving(run: Path) -> Iterator[Path]:
    """Where to write a checkpoint; what went wrong there leaves the run's checkpoints as they were.

    Args:
        run: The run's folder.

    Yields:
        A folder to write in.

    Raises:
        SavingError: It cannot be written.
    """
    from safetensors import SafetensorError

    unfinished = run / UNFINISHED
    try:
        yield unfinished
    # A full disk is an OSError here, a SafetensorError there, and a RuntimeError to torch.save.
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if shutil.disk_usage(run).free < _FULL:
            # torch.save speaks of positions in its file.
            reason = "no space is left on the device"
        shutil.rmtree(unfinished, ignore_errors=True)
        last = last_checkpoint(run)
        left = f"{last} is whole" if last is not None else "there was none before"
        raise SavingError(
            f"The checkpoint cannot be written to {run} ({reason}); {left}: make room and go on with --resume {run}."
        ) from error


def publish(run: Path, step: int, state: TrainerState, save_total_limit: int | None) -> Path:
    """Give a written checkpoint its name and only then delete the oldest ones.

    Args:
        run: The run's folder, which holds the written checkpoint in `UNFINISHED`.
        step: The checkpoint's step.
        state: Of the training; names the best checkpoint.
        save_total_limit: How many checkpoints stay; None for all.

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
        _flush(path)
    if final.exists():
        # The same step once more, as after --resume with nothing left to do: the old one moves aside first.
        shutil.rmtree(run / UNFINISHED / "old", ignore_errors=True)
        final.rename(run / UNFINISHED / "old")
    written.rename(final)
    _flush(run)
    shutil.rmtree(run / UNFINISHED, ignore_errors=True)
    rotate_checkpoints(
        output_dir=str(run), save_total_limit=save_total_limit, best_model_checkpoint=state.best_model_checkpoint
    )
    return final


def _flush(path: Path) -> None:
    """Have the disk take what the system holds back: a rename must not overtake the data."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
