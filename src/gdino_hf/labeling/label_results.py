"""The files of a finished run, made from its shards one after the other: errors, data set formats, list of shards.

They depend on the shards alone, so how often a run was stopped, or by how many processes it was done, changes no byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from ..detection.dataset_files import DataSetFiles
from ..detection.exchange_values import kept_library
from ..error_text import reason
from ..model.printable import printable
from ..whole_files import whole_file
from .label_settings import write_manifest
from .label_store import LabelStore, finished_shards, shard_name
from .label_workers import Tally
from .shard_files import LabelRow, read_counts, read_shard

ERRORS = "errors.parquet"
SHARD_LIST = "shards.jsonl"
# Errors that are gathered before they are written.
_AT_ONCE = 10_000


@dataclass(frozen=True)
class LabelSummary:
    """What a run has done.

    Attributes:
        folder: Folder of results, or its address.
        pictures: Number of pictures, failed ones too.
        boxes: Number of boxes.
        failed: Number of pictures that could not be used.
        shards: Number of shards.
        formats: File, or folder of several files, of each format that was asked for; an address if `folder` is one.
        pictures_folder: Folder that the formats' names of pictures are relative to; None if there is none.
        finished: Whether all pictures are done, and not those of this process alone.
    """

    folder: Path | str
    pictures: int
    boxes: int
    failed: int
    shards: int
    formats: Mapping[str, Path | str]
    pictures_folder: Path | None = None
    finished: bool = True


def shard_tally(store: LabelStore, number: int) -> Tally:
    """Return the numbers of a shard that is written.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged.
    """
    with _named(store, number):
        counts = read_counts(str(store.path(shard_name(number))))
    return Tally(counts.pictures, counts.boxes, counts.failed)


def write_results(
    store: LabelStore,
    settings: Mapping[str, Any],
    names: Sequence[str],
    formats: Sequence[str] = (),
    keep_empty: bool = True,
) -> LabelSummary:
    """Write the files of a run whose shards are all there; its manifest says last that it is finished.

    Args:
        store: Files of the run.
        settings: Its settings.
        names: Its labels.
        formats: Names of `gdino_hf.detection.dataset_files.FORMATS`.
        keep_empty: Whether the formats list pictures in which nothing was found.

    Raises:
        ImportError: A format needs a library that is not installed.
        OSError: A file cannot be written.
        ValueError: A shard is damaged.
    """
    numbers = sorted(finished_shards(store))
    _write_errors(store, numbers)
    root, paths = None, {}
    if formats:
        root = _pictures_folder(store, numbers)
        with DataSetFiles(store.folder, formats, names) as files:
            for row in shard_rows(store, numbers):
                if row.found is not None and (keep_empty or len(row.found)):
                    files.add(row.detections(), _name(row.source, root))
        paths = files.paths()
    total = _write_list(store, numbers)
    write_manifest(store, settings, finished=True, shards=len(numbers), **asdict(total))
    return LabelSummary(store.folder, **asdict(total), shards=len(numbers), formats=paths, pictures_folder=root)


def shard_rows(store: LabelStore, numbers: Sequence[int]) -> Iterator[LabelRow]:
    """Yield the rows of shards in order.

    Args:
        store: Files of the run.
        numbers: Numbers of the shards.

    Raises:
        OSError: A shard cannot be read.
        ValueError: A shard is damaged.
    """
    for number in numbers:
        with _named(store, number):
            yield from read_shard(store.read(shard_name(number)))


@contextmanager
def _named(store: LabelStore, number: int) -> Iterator[None]:
    """Say which shard is damaged, and what to do about it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{printable(store.path(shard_name(number)))} is damaged ({reason(error)}); label its pictures again in "
            "another folder, or bring back a copy."
        ) from error


def _found(store: LabelStore, numbers: Sequence[int]) -> Iterator[Any]:
    """Yield the detections of each picture, without masks, which `LabelRow.detections` decompresses."""
    return (row.found for row in shard_rows(store, numbers) if row.found is not None)


def _write_errors(store: LabelStore, numbers: Sequence[int]) -> None:
    """Write the sources that failed, each with its reason; an empty table if none did."""
    arrow = kept_library("pyarrow", "Labelling needs", "label")
    parquet = kept_library("pyarrow.parquet", "Labelling needs", "label")
    schema = arrow.schema({"source": arrow.string(), "reason": arrow.string()})
    with ExitStack() as stack:
        unfinished = stack.enter_context(whole_file(store.path(ERRORS)))
        file = stack.enter_context(parquet.ParquetWriter(unfinished, schema))
        waiting: list[dict[str, Any]] = []
        for row in shard_rows(store, numbers):
            if row.error is not None:
                waiting.append({"source": row.source, "reason": row.error})
            if len(waiting) == _AT_ONCE:
                file.write_table(arrow.Table.from_pylist(waiting, schema))
                waiting = []
        file.write_table(arrow.Table.from_pylist(waiting, schema))


def _write_list(store: LabelStore, numbers: Sequence[int]) -> Tally:
    """Write what each shard holds, and return what they hold together."""
    total = Tally()
    with whole_file(store.path(SHARD_LIST)) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for number in numbers:
            path = store.path(shard_name(number))
            counts = read_counts(str(path))
            total += Tally(counts.pictures, counts.boxes, counts.failed)
            line = {"file": shard_name(number), **asdict(counts), "bytes": path.stat().st_size}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return total


def _pictures_folder(store: LabelStore, numbers: Sequence[int]) -> Path | None:
    """Return the folder that holds all pictures, directly or in sub-folders; addresses are passed over."""
    common: str | None = None
    for found in _found(store, numbers):
        if "://" in found.source:
            continue
        folder = os.path.dirname(found.source)
        try:
            common = folder if common is None else os.path.commonpath((common, folder))
        except ValueError:
            # Pictures on several drives.
            return None
    return None if common is None else Path(common)


def _name(source: str, root: Path | None) -> str:
    if root is None or "://" in source:
        return source
    return PurePath(os.path.relpath(source, root)).as_posix()
