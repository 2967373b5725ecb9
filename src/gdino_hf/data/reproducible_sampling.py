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

from ..error_text import reason
from ..model.option_flags import checked_flag
from ..model.printable import printable

logger = logging.getLogger(__name__)

OnError = Literal["stop", "skip"]


class SampleKey(NamedTuple):
    """Identity of one draw of one row, which seeds everything random about it.

    Attributes:
        epoch: Number of the pass over the data, from 0.
        row: Index of the row.
        copy: Number of times the row was already drawn in this epoch.
    """

    epoch: int
    row: int
    copy: int = 0


class ReproducibleSampler(torch.utils.data.Sampler[SampleKey]):
    """Draws every row once per epoch, in an order that depends only on the seed and the epoch.

    Args:
        num_rows: Number of rows in the data set.
        seed: Seed for the order.
        shuffle: Whether to shuffle each epoch; otherwise rows keep their order.
        weights: Mean number of draws of each row per epoch, used to oversample rare names. Fractions are drawn at
            random in each epoch; the length of an epoch is always the rounded sum. None draws each row once.
        multiple: Number that the length of an epoch is rounded up to a multiple of, by drawing its first rows again.
            With the number of images per optimization step over all processes, the last step of an epoch is complete
            and thus the same for any number of processes.

    Raises:
        ValueError: There are no rows, the weights do not match them, or `multiple` is below 1.
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
            raise ValueError(f"weights must be {num_rows} numbers of at least 0, not all 0; got {len(weights)}.")
        if multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {multiple}.")
        self.num_rows = num_rows
        self.seed = seed
        self.shuffle = checked_flag(shuffle, "shuffle")
        self.multiple = multiple
        self.weights = list(weights) if weights is not None else None
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return -(-self._length_before_filling() // self.multiple) * self.multiple

    def _length_before_filling(self) -> int:
        return self.num_rows if self.weights is None else round(sum(self.weights))

    def __iter__(self) -> Iterator[SampleKey]:
        rng = random.Random(f"order {self.seed} {self.epoch}")
        length = self._length_before_filling()
        order = list(range(length)) if self.weights is None else _systematic_sample(self.weights, length, rng)
        keys, seen = [], Counter[int]()
        for index in order:
            keys.append(SampleKey(self.epoch, index, seen[index]))
            seen[index] += 1
        if self.shuffle:
            rng.shuffle(keys)
        for place in range(len(self) - length):
            row = keys[place].row
            keys.append(SampleKey(self.epoch, row, seen[row]))
            seen[row] += 1
        return iter(keys)


class ReproducibleDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows that carry the sample key they were drawn with; images that cannot be read are reported or skipped.

    Args:
        rows: A `datasets.Dataset` or any sequence of rows.
        on_error: Reaction to an image that cannot be read: "stop" raises a ValueError that names it, "skip" logs it and
            returns the next row instead.
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
        """Return a row.

        Args:
            item: A key from a `ReproducibleSampler`, or a plain index, which gives a row without "sample_key".

        Returns:
            The row. A row that replaces an unreadable one carries the sample key that was asked for.

        Raises:
            ValueError: The image cannot be read.
        """
        if isinstance(item, tuple):
            key = SampleKey(*item)
            return {**self._read(key.row), "sample_key": key}
        return self._read(item)

    def _read(self, index: int) -> dict[str, Any]:
        for step in range(len(self.rows)):
            place = (index + step) % len(self.rows)
            try:
                return dict(self.rows[place])
            # A damaged file makes the decoders raise exceptions of almost any type.
            except Exception as error:
                fault = f"The image {printable(self._name(place))} cannot be read ({reason(error)})"
                if self.on_error == "stop":
                    raise ValueError(f"{fault}; repair it, or skip such images.") from error
                if place not in self._named:
                    self._named.add(place)
                    logger.warning("%s; the next row is used instead.", fault)
        raise ValueError(f"None of the {len(self.rows)} images can be read; see the log.")

    def _name(self, index: int) -> str:
        try:
            from datasets import Image

            return str(self.rows.cast_column("image", Image(decode=False))[index]["image"]["path"])
        # Only rows of `datasets` have such a column.
        except Exception:
            return f"of row {index}"


class ReproducibleStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """A `ReproducibleDataset` for streamed rows; the `row` of a sample key is the row's `image_id`.

    Args:
        rows: A `datasets.IterableDataset` from one of this package's readers.
        seed: Seed for the order.
        buffer: Number of rows in the shuffle buffer; 0 keeps the file's order.
        on_error: Reaction to an image that cannot be read: "stop" raises a ValueError that names it, "skip" logs it and
            drops the row.
        endless: Whether to continue with the next epoch at the end of one. Batches to skip in a resumed run are then
            counted over all epochs, and no batch is shorter than the others.
    """

    def __init__(
        self, rows: Any, seed: int = 0, buffer: int = 1000, on_error: OnError = "stop", endless: bool = False
    ) -> None:
        from datasets import Image

        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}.")
        # Images are decoded in `_epoch_rows`, where a damaged one cannot be mistaken for the end of the data.
        rows = rows.cast_column("image", Image(decode=False))
        self.rows = rows.shuffle(seed=seed, buffer_size=buffer) if buffer else rows
        self.on_error = on_error
        self.endless = endless
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the epoch; if endless, of all epochs from this one on.

        Raises:
            ValueError: An image cannot be read and `on_error` is "stop", or no image of an epoch can be read.
        """
        for epoch in itertools.count(self.epoch):
            num_read = num_rows = 0
            for row in self._epoch_rows(epoch):
                num_rows += 1
                if row is not None:
                    num_read += 1
                    yield row
            if num_rows and not num_read:
                raise ValueError(f"None of the {num_rows} images can be read; see the log.")
            # With fewer parts of the file than worker processes, some workers have no rows.
            if not self.endless or not num_rows:
                return

    def _epoch_rows(self, epoch: int) -> Iterator[dict[str, Any] | None]:
        """Yield the rows of an epoch, and None in place of each row whose image is skipped."""
        from .picture_column import PictureColumn

        decoder = PictureColumn()
        self.rows.set_epoch(epoch)
        for row in self.rows:
            try:
                image = decoder.decode_example(row["image"])
            # A damaged file makes the decoders raise exceptions of almost any type.
            except Exception as error:
                fault = f"The image {printable(row['image'].get('path'))} cannot be read ({reason(error)})"
                if self.on_error == "stop":
                    raise ValueError(f"{fault}; repair it, or skip such images.") from error
                logger.warning("%s; it is skipped.", fault)
                yield None
                continue
            yield {**row, "image": image, "sample_key": SampleKey(epoch, row["image_id"])}


def row_random(row: Mapping[str, Any], seed: int) -> random.Random | None:
    """Return the random generator for one draw of a row.

    Args:
        row: A row from a `ReproducibleDataset` or `ReproducibleStream`.
        seed: Seed of the training run.

    Returns:
        A generator that depends only on the seed and the row's sample key; None if the row has no sample key.
    """
    key = row.get("sample_key")
    return None if key is None else random.Random(f"row {seed} {tuple(key)}")


def _systematic_sample(weights: Iterable[float], total: int, rng: random.Random) -> list[int]:
    """Draw `total` indices in proportion to their weights by systematic sampling: evenly spaced marks on the sum."""
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
