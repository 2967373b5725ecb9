"""Which pictures of a shard worker processes die of: those at work at each death are looked at alone to find out.

A process reads ahead and runs batches, so the pictures at work when it dies are more than those it died of.
"""

from __future__ import annotations

from collections.abc import Collection

MOST_DEATHS = 3
"""Number of times that processes may die on one shard before its pictures are looked at alone."""

# Suspects are looked at alone first, then all pictures. If processes still die of the shard, it is given up.
_ROUNDS = 2


class Blame:
    """Finds the pictures of one shard that processes die of.

    Args:
        pictures: Number of pictures in the shard.

    Attributes:
        left_out: Places of pictures that are not touched any more.
    """

    def __init__(self, pictures: int) -> None:
        self.left_out: set[int] = set()
        self._all = set(range(pictures))
        self._deaths: list[set[int]] = []
        self._looked_at: set[int] = set()
        self._rounds = 0

    def shard_died(self, at_work: Collection[int]) -> list[int]:
        """Note that a process died that labelled the shard.

        Args:
            at_work: Places of the pictures that it had begun and not finished.

        Returns:
            Places of the pictures to look at alone; none if the shard is to be tried again without `left_out`.
        """
        self._deaths.append(set(at_work))
        if len(self._deaths) < MOST_DEATHS:
            return []
        suspects = set.intersection(*self._deaths) if self._rounds == 0 else set()
        self._deaths = []
        if self._rounds == _ROUNDS:
            self.left_out = set(self._all)
            return []
        self._rounds += 1
        self._looked_at = (suspects or self._all) - self.left_out
        return sorted(self._looked_at)

    def looked_at(self, place: int, died: bool) -> bool:
        """Note what became of a process that looked at a picture alone.

        Args:
            place: Place of the picture.
            died: Whether the process died.

        Returns:
            Whether all suspects were looked at, so that the shard is to be tried again without `left_out`.
        """
        if died:
            self.left_out.add(place)
        self._looked_at.discard(place)
        return not self._looked_at
