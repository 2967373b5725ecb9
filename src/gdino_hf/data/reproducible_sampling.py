"""Reproducible epochs: a sampler whose keys seed all randomness, and the data sets that carry these keys.

A training run that is killed and resumed, or split among processes, draws the same augmentation and the same negative
labels for every row as one uninterrupted process, because nothing depends on what a process did before:

    rows = ReproducibleDataset(dataset)                       # train_dataset
    sampler = ReproducibleSampler(len(rows), seed=0)          # Trainer._get_train_sampler returns it
    collator = GDinoDataCollator(processor, labels=names, transform=..., seed=0)

The sampler yields `SampleKey(epoch, row, copy)`. The data set returns that row with the key as "sample_key", and the
collator seeds the row's augmentation and negative labels with (seed, key). Worker processes need no seeds of their own,
since the key travels with the index.

To resume, call `sampler.set_epoch(epoch)` and skip the batches of that epoch that were already trained on. Trainer does
both in a single process. With several processes, accelerate's `skip_first_batches` hides the sampler from Trainer, so a
callback that knows the sampler calls `sampler.set_epoch(int(state.epoch or 0))` in `on_epoch_begin`; this is harmless
in a single process.

Each row's share of a batch must depend on that row alone: give the collator `labels` or a `prompt_sampler`. Without
either, a prompt holds the names of the whole batch.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from .rows import reason

logger = logging.getLogger(__name__)

OnError = Literal["stop", "skip"]


class SampleKey(NamedTuple):
    """One look at one row.

    Attributes:
        epoch: Which pass over the data, from 0.
        row: Its index.
        copy: How often the row came before in this epoch.
    """

    epoch: int
    row: int
    copy: int = 0


class ReproducibleSampler(torch.utils.data.Sampler[SampleKey]):
    """Every row once an epoch, in an order that follows from seed and epoch alone.

    Args:
        num_rows: Rows of the data set.
        seed: Of the order.
        shuffle: Whether the order changes; otherwise it is that of the rows.
        weights: How often each row comes in an epoch, for rare names: a fraction is a probability, drawn anew each
            epoch. The number of visits is the same in every epoch, the rounded sum.
        multiple: An epoch is filled up with further visits of its first rows to a multiple of this. With the images of
            a step over all processes, the last step of an epoch is whole, and so the same however it is parted.

    Raises:
        ValueError: There is no row, or not one weight for each, or the multiple is below 1.
    """

    def __init__(
        self,
        num_rows: int,
        seed: int = 0,
        shuffle: bool = True,
        weights: Sequence[float] | None = None,
        multiple: int = 1,
    ) -> None:
        if num_rows < 1:
            raise ValueError("The data set has no rows, so there is nothing to train on.")
        if weights is not None and (len(weights) != num_rows or min(weights) < 0 or sum(weights) < 0.5):
            raise ValueError(f"There must be {num_rows} weights of at least 0, some above it; got {len(weights)}.")
        if multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {multiple}.")
        self.num_rows = num_rows
        self.seed = seed
        self.shuffle = shuffle
        self.multiple = multiple
        self.weights = list(weights) if weights is not None else None
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is walked through next.

        Args:
            epoch: From 0.
        """
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return -(-self._own_length() // self.multiple) * self.multiple

    def _own_length(self) -> int:
        return self.num_rows if self.weights is None else round(sum(self.weights))

    def __iter__(self) -> Iterator[SampleKey]:
        rng = random.Random(f"order {self.seed} {self.epoch}")
        length = self._own_length()
        order = list(range(length)) if self.weights is None else _systematic(self.weights, length, rng)
        visits, seen = [], Counter[int]()
        for index in order:
            visits.append(SampleKey(self.epoch, index, seen[index]))
            seen[index] += 1
        if self.shuffle:
            rng.shuffle(visits)
        for place in range(len(self) - length):
            row = visits[place].row
            visits.append(SampleKey(self.epoch, row, seen[row]))
            seen[row] += 1
        return iter(visits)


class ReproducibleDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows that know their visit, and pictures that cannot be read dealt with.

    Args:
        rows: A `datasets.Dataset` or any sequence of rows.
        on_error: What a picture that cannot be read does: "stop" raises one clear ValueError, "skip" names it in the
            log and takes the next row's instead.
    """

    def __init__(self, rows: Any, on_error: OnError = "stop") -> None:
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}.")
        self.rows = rows
        self.on_error = on_error
        self._named: set[int] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: SampleKey | int) -> dict[str, Any]:
        """A row.

        Args:
            item: From a `ReproducibleSampler`, or the plain index, which gives a row without "sample_key".

        Returns:
            The row; one taken in another's place has that one's visit.

        Raises:
            ValueError: The picture cannot be read.
        """
        if isinstance(item, tuple):
            visit = SampleKey(*item)
            return {**self._read(visit.row), "sample_key": visit}
        return self._read(item)

    def _read(self, index: int) -> dict[str, Any]:
        for step in range(len(self.rows)):
            place = (index + step) % len(self.rows)
            try:
                return dict(self.rows[place])
            # Decoders raise whatever a damaged file leads them to.
            except Exception as error:
                fault = f"The picture {self._name(place)} cannot be read ({reason(error)})"
                if self.on_error == "stop":
                    raise ValueError(f"{fault}; repair it, or skip such pictures.") from error
                if place not in self._named:
                    self._named.add(place)
                    logger.warning("%s; the next row's is taken.", fault)
        raise ValueError(f"None of the {len(self.rows)} pictures can be read; see the log.")

    def _name(self, index: int) -> str:
        try:
            from datasets import Image

            return str(self.rows.cast_column("image", Image(decode=False))[index]["image"]["path"])
        # Other rows than those of `datasets` have no such column.
        except Exception:
            return f"of row {index}"


class ReproducibleStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """The same for rows that are streamed: the visit's row is its `image_id`.

    Args:
        rows: A `datasets.IterableDataset` of this package.
        seed: Of the order.
        buffer: Rows held for drawing the next one from at random; 0 keeps the file's order.
        on_error: As in `ReproducibleDataset`; "skip" leaves the row out.
        endless: Begin the next epoch at the end of one. Batches skipped in a resumed run are then counted over all
            epochs, and no batch is short.
    """

    def __init__(
        self, rows: Any, seed: int = 0, buffer: int = 1000, on_error: OnError = "stop", endless: bool = False
    ) -> None:
        from datasets import Image

        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}.")
        # Decoded here, where a damaged picture can be told from the end of the data.
        rows = rows.cast_column("image", Image(decode=False))
        self.rows = rows.shuffle(seed=seed, buffer_size=buffer) if buffer else rows
        self.on_error = on_error
        self.endless = endless
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is walked through next.

        Args:
            epoch: From 0.
        """
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows of this epoch, or of this one and all that follow.

        Raises:
            ValueError: A picture, or none of an epoch's pictures, can be read.
        """
        for epoch in itertools.count(self.epoch):
            num_read = num_rows = 0
            for row in self._walk(epoch):
                num_rows += 1
                if row is not None:
                    num_read += 1
                    yield row
            if num_rows and not num_read:
                raise ValueError(f"None of the {num_rows} pictures can be read; see the log.")
            # A worker process may have no rows at all.
            if not self.endless or not num_rows:
                return

    def _walk(self, epoch: int) -> Iterator[dict[str, Any] | None]:
        """The rows of an epoch, None for one whose picture is passed over."""
        from datasets import Image

        decoder = Image()
        self.rows.set_epoch(epoch)
        for row in self.rows:
            try:
                image = decoder.decode_example(row["image"])
            # As above.
            except Exception as error:
                fault = f"The picture {row['image'].get('path')} cannot be read ({reason(error)})"
                if self.on_error == "stop":
                    raise ValueError(f"{fault}; repair it, or skip such pictures.") from error
                logger.warning("%s; it is left out.", fault)
                yield None
                continue
            yield {**row, "image": image, "sample_key": SampleKey(epoch, row["image_id"])}


def row_random(row: Mapping[str, Any], seed: int) -> random.Random | None:
    """The randomness of one visit.

    Args:
        row: From `ReproducibleDataset` or `ReproducibleStream`.
        seed: Of the training.

    Returns:
        A generator that depends on seed and visit only; None for a row without a visit.
    """
    visit = row.get("sample_key")
    return None if visit is None else random.Random(f"row {seed} {tuple(visit)}")


def _systematic(weights: Iterable[float], total: int, rng: random.Random) -> list[int]:
    """As many indices as asked for, each at its weight's frequency: evenly spaced marks on the weights' sum."""
    weights = list(weights)
    spacing = sum(weights) / total
    mark, passed = rng.random() * spacing, 0.0
    chosen: list[int] = []
    for index, weight in enumerate(weights):
        passed += weight
        while mark < passed and len(chosen) < total:
            chosen.append(index)
            mark += spacing
    return chosen + [len(weights) - 1] * (total - len(chosen))
