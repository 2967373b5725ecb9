"""Processes that `accelerate launch`, `torchrun` or a scheduler starts to share one run."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """This process among those that label the same pictures into the same folder.

    Attributes:
        rank: Its number, from 0; it labels the shards whose number has this remainder.
        world: Number of processes.
        on_this_machine: Number of processes on this machine, which share its cores.
        local: Number of this process on this machine; with several GPUs, it chooses one.
    """

    rank: int = 0
    world: int = 1
    on_this_machine: int = 1
    local: int = 0

    @classmethod
    def of_environment(cls) -> Ranks:
        """Return what RANK and WORLD_SIZE say, as `accelerate launch` and `torchrun` set them.

        Raises:
            ValueError: They are no such numbers.
        """
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise ValueError(
                f"RANK is {rank!r} and WORLD_SIZE is {world!r}; RANK counts from 0 up to below WORLD_SIZE."
            )
        here, local = os.environ.get("LOCAL_WORLD_SIZE", "1"), os.environ.get("LOCAL_RANK", "0")
        return cls(int(rank), int(world), *(int(text) if text.isdecimal() else 0 for text in (here, local)))
