"""Processes with ranks that agree on something and wait for each other, beside the work that they share by numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ..error_text import reason
from .label_workers import WorkerError
from .ranks import Ranks

# A rank may wait for as long as the slowest one works; one that dies ends the wait at once.
_LONGEST_WAIT = timedelta(days=30)


@dataclass(frozen=True)
class RankGroup:
    """The processes that share a run; one process alone waits for nobody.

    Attributes:
        ranks: This process among them.
    """

    ranks: Ranks

    def share(self, value: Any) -> Any:
        """Return rank 0's value in every process."""
        values = [value]
        if self.ranks.world > 1:
            import torch.distributed

            with _lost_ranks():
                torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def meet(self) -> None:
        """Wait until every process is here.

        Raises:
            WorkerError: One has ended before.
        """
        if self.ranks.world > 1:
            import torch.distributed

            with _lost_ranks():
                torch.distributed.barrier()


@contextmanager
def rank_group(ranks: Ranks) -> Iterator[RankGroup]:
    """Join the processes of all ranks during the `with` block.

    Raises:
        ValueError: MASTER_ADDR or MASTER_PORT, by which they find each other, is missing.
        WorkerError: They do not find each other.
    """
    import torch.distributed

    if ranks.world == 1 or torch.distributed.is_initialized():
        yield RankGroup(ranks)
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {ranks.world}, but {missing[0]} is not set; start the processes with `accelerate launch`, "
            "which sets it."
        )
    with _lost_ranks():
        torch.distributed.init_process_group("gloo", rank=ranks.rank, world_size=ranks.world, timeout=_LONGEST_WAIT)
    try:
        yield RankGroup(ranks)
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def _lost_ranks() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise WorkerError(f"another process of the run was lost ({reason(error, most_lines=1)}).") from error
