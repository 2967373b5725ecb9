"""Labelling as a step of a Ray Data pipeline: rows with pictures in, the rows of `gdino label` out."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..detection.exchange_values import kept_library
from ..detection.vocabulary import Labels, Vocabulary
from .death_journal import DeathJournal, journal_folder
from .label_settings import LabelJob
from .ray_workers import RAY_NEED, adopt_variables, gpus_of_task, own_variables
from .shard_files import LabelRow, shard_table
from .shard_labels import DIED, PictureReader, ShardLabeler
from .source_items import SourceItem

# Columns that hold pictures and their names, by the names that Ray's own readers and Hugging Face data sets give them.
_PICTURES = ("image", "bytes", "content", "path")
_NAMES = ("path", "source", "name", "file_name", "id")


def ray_data(
    ds: Any,
    labels: Labels | Vocabulary,
    *,
    model: str = "nano",
    job: LabelJob | None = None,
    picture: str | None = None,
    name: str | None = None,
    concurrency: int | tuple[int, int] | None = None,
    num_cpus: int = 1,
    num_gpus: float | None = None,
    rows: int = 32,
) -> Any:
    """Label the pictures of a Ray data set in a pool of actors, each of which holds the model.

    Ray starts and ends actors within the bounds, gives them no more rows than they can take, and repeats the rows of
    actors and machines that are lost. Rows that the actors of one machine die of three times are looked at one by one,
    and a picture that an actor dies of is a failure. A row depends on its own picture alone if the job's batch size is
    1, and on the pictures beside it in its batch, in the last digits, if it is more.

    Args:
        ds: The `ray.data.Dataset`, such as `ray.data.read_images(...)` or `ray.data.read_parquet(...)`.
        labels: What to look for: a vocabulary, or labels in any form that `Vocabulary` takes.
        model: "nano", Hub id, or folder that all machines see; not used if there is a job.
        job: How pictures are labelled; None for the defaults of `LabelJob` with the model.
        picture: Column of pictures: paths or addresses, bytes, structs with `bytes` or `path`, or (H, W, 3) arrays.
            None for the first of the columns "image", "bytes", "content" and "path".
        name: Column of the pictures' names, which become "source". None for the column of pictures if it holds paths,
            and else for the first of "path", "source", "name", "file_name" and "id".
        concurrency: Number of actors, or the smallest and the largest; None for at least one and as many as there is
            room for.
        num_cpus: Cores of an actor; its model computes in as many threads.
        num_gpus: GPUs of an actor, such as 0.5 for two actors on each; None for 1 if the cluster has any and the job's
            device is not "cpu", and else 0.
        rows: Most pictures in a call of an actor.

    Returns:
        A data set with the columns of a shard of `gdino label`: source, status, width, height, boxes, scores, labels,
        error and place, and masks if the job has a segmenter, a row for each picture. It is computed when it is used.

    Raises:
        ImportError: Ray is not installed.
        ValueError: The data set has no such column, or a number is out of range.
    """
    data = kept_library("ray.data", RAY_NEED, "ray")
    job = job or LabelJob(model)
    columns = _columns(ds, picture, name)
    smallest: int
    largest: int | None
    if isinstance(concurrency, tuple):
        smallest, largest = concurrency
    else:
        smallest, largest = (1, None) if concurrency is None else (concurrency, concurrency)
    if smallest < 1 or (largest is not None and largest < smallest):
        raise ValueError(f"concurrency is {concurrency}; give a number of actors, or the smallest and the largest.")
    if num_cpus < 1 or rows < 1:
        raise ValueError(f"num_cpus is {num_cpus} and rows is {rows}; give at least 1.")
    return ds.map_batches(
        RowLabeler,
        fn_constructor_args=(
            replace(job, device="cuda") if job.device.startswith("cuda") else job,
            labels if isinstance(labels, Vocabulary) else Vocabulary(labels),
            columns,
            num_cpus,
            # Actors on busy machines must not choose by what they measure.
            {**own_variables(), "GDINO_ARITHMETIC": "fixed"},
            secrets.token_hex(16),
        ),
        batch_size=rows,
        batch_format="numpy",
        compute=data.ActorPoolStrategy(min_size=smallest, max_size=largest),
        num_cpus=num_cpus,
        num_gpus=gpus_of_task(job.device, num_gpus),
    )


class RowLabeler:
    """A model that labels batches of rows.

    Args:
        job: How pictures are labelled.
        vocabulary: What to look for.
        columns: Columns of pictures and of their names.
        threads: Threads that the model computes in.
        variables: Environment variables of this package where the pipeline was made.
        run: Name of the pipeline, under which the processes of a machine note what they died of.
    """

    def __init__(
        self,
        job: LabelJob,
        vocabulary: Vocabulary,
        columns: tuple[str, str],
        threads: int,
        variables: Mapping[str, str],
        run: str,
    ) -> None:
        import torch

        adopt_variables(variables)
        torch.set_num_threads(threads)
        self._picture, self._name = columns
        self._run = run
        self._files = PictureReader()
        self._labeler = ShardLabeler(job, vocabulary, read=self._read)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> Any:
        """Return the Arrow table of a batch's labels, a row for each row.

        Args:
            batch: Columns as arrays or lists.
        """
        pairs = zip(batch[self._name], batch[self._picture], strict=True)
        items = [_item(_as_name(name), picture) for name, picture in pairs]
        journal = DeathJournal(journal_folder(self._run), [item.source for item in items])
        rows = self._each_alone(items, journal) if journal.begin() else self._labeler.rows(items)
        journal.end()
        return shard_table([replace(row, place=None) for row in rows], self._labeler.job.segmenter is not None)

    def _each_alone(self, items: Sequence[SourceItem], journal: DeathJournal) -> list[LabelRow]:
        """Label pictures of which earlier processes died one by one, which tells the culprit if this process dies."""
        rows: list[LabelRow] = []
        for place, item in enumerate(items):
            if journal.is_deadly(place):
                rows.append(LabelRow(item.source, error=DIED))
                continue
            with journal.alone(place):
                rows += self._labeler.rows([item])
        return rows

    def _read(self, item: SourceItem) -> Any:
        assert item.place is not None
        content = item.place[0]
        return self._files(SourceItem(content)) if isinstance(content, str) else content


def _item(name: str, picture: Any) -> SourceItem:
    if isinstance(picture, Mapping):
        path = picture.get("path")
        picture = picture.get("bytes")
        picture = path if picture is None else picture
    if picture is None:
        return SourceItem(name, fault="the row has no picture")
    if isinstance(picture, np.generic):
        picture = picture.item()
    return SourceItem(name, (picture,))


def _as_name(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("path")
    return os.fsdecode(value) if isinstance(value, bytes) else str(value)


def _columns(ds: Any, picture: str | None, name: str | None) -> tuple[str, str]:
    """Return the columns of pictures and of their names.

    Raises:
        ValueError: There is no such column.
    """
    there = list(ds.columns() or ())
    found: list[str] = []
    for what, wanted, usual in (("pictures", picture, _PICTURES), ("names", name, _NAMES)):
        if wanted is None:
            wanted = next((column for column in usual if column in there), None)
        if wanted is None or wanted not in there:
            shown = "no column" if wanted is None else f"no column {wanted!r}"
            raise ValueError(
                f"The data set has {shown} of {what}, but {', '.join(there) or 'none'}; name it with "
                f"{'picture' if what == 'pictures' else 'name'}=, and make one of paths or numbers if there is none."
            )
        found.append(wanted)
        if name is None and what == "pictures" and _holds_paths(ds, wanted):
            return wanted, wanted
    return found[0], found[1]


def _holds_paths(ds: Any, column: str) -> bool:
    """Return whether a column holds text."""
    schema = ds.schema()
    kind = str(schema.types[schema.names.index(column)])
    return kind in ("string", "large_string")
