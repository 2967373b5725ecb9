"""A run of bulk labelling: refused, begun or continued, done by one process or many, and finished once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from ..detection.dataset_files import DataSetFiles
from ..detection.vocabulary import Labels, Vocabulary
from ..error_text import reason
from ..model.printable import printable
from .folder_lock import FolderLock
from .label_computing import cores, same_arithmetic, torch_threads
from .label_order import LabelOrder
from .label_progress import LabelProgress
from .label_results import LabelSummary, shard_tally, write_results
from .label_settings import (
    LabelJob,
    check_same,
    model_fingerprint,
    read_manifest,
    run_settings,
    settings_digest,
    write_manifest,
)
from .label_store import MANIFEST, PLAN, VOCABULARY, LabelStore, finished_shards, shard_name
from .label_workers import NoShard, Shard, Tally, WorkerError, WorkerPool
from .ranks import Ranks
from .ray_workers import RayCluster, RayPool, connected
from .remote_results import at_address, is_address, working_folder
from .shard_files import LabelRow, encode_shard, shard_schema
from .shard_labels import ShardLabeler, job_detector
from .shard_plan import Planner, PlanReader
from .sources import Sources, nothing_found

# Seconds between two looks at what other processes have written.
_PATIENCE = 0.2
_RANK_PATIENCE = 1.0


def label_pictures(
    sources: Sequence[str | Path],
    labels: Labels | Vocabulary,
    out: str | Path,
    *,
    job: LabelJob | None = None,
    formats: Sequence[str] = (),
    keep_empty: bool = True,
    workers: int = 1,
    ranks: Ranks | None = None,
    cluster: RayCluster | None = None,
    progress: LabelProgress | None = None,
) -> LabelSummary:
    """Label any number of pictures; the same call goes on with a run that was stopped.

    Args:
        sources: What to label, see `Sources`.
        labels: What to look for: a vocabulary, or labels in any form that `Vocabulary` takes.
        out: Folder of results: shards as Parquet, a manifest, errors, and the formats. It may be an address that fsspec
            can write, such as s3://bucket/labels; files are then finished in a folder here and sent.
        job: The model and how it computes; None for the defaults of `LabelJob`.
        formats: Data set formats to write as well, see `gdino_hf.detection.dataset_files.FORMATS`.
        keep_empty: Whether the formats list pictures in which nothing was found.
        workers: Number of processes, which share the cores; 1 works in this process. A script that starts several
            needs the guard `if __name__ == "__main__"`.
        ranks: This process among several that share the work; None for what RANK and WORLD_SIZE say.
        cluster: A Ray cluster that labels the shards instead of this machine; None uses this machine.
        progress: Where to show progress; None shows none.

    Returns:
        What was done.

    Raises:
        ImportError: A library is not installed.
        OSError: The results cannot be written, or the workers cannot go on. The same call goes on later.
        ValueError: The sources, the labels, the model or the address cannot be used; or the folder holds a run with
            other settings, or a run that another process is working on.
    """
    job, ranks, progress = job or LabelJob(), ranks or Ranks.of_environment(), progress or LabelProgress()
    vocabulary = labels if isinstance(labels, Vocabulary) else Vocabulary(labels)
    if workers < 1:
        raise ValueError(f"workers is {workers}; give at least 1.")
    if cluster is not None and (workers > 1 or ranks.world > 1):
        raise ValueError("A Ray cluster brings its own workers; give either it, or several workers or ranks.")
    shard_schema()
    # Formats that cannot be written are refused before the work.
    DataSetFiles(out, formats, vocabulary.labels)
    arguments = [str(source) for source in sources]

    def label_into(folder: Path, check: Callable[[], None]) -> LabelSummary:
        store = LabelStore(folder, shown=str(out))
        lock = FolderLock(store, ranks, progress.say, check)
        with same_arithmetic():
            run = _Run(store, job, vocabulary, Sources(arguments, folder), lock, progress)
            with connected(cluster) if cluster is not None else nullcontext():
                return _finish(run, workers, cluster, formats, keep_empty)

    if not is_address(out):
        return label_into(Path(out), lambda: None)
    address = str(out).rstrip("/")
    if ranks.world > 1:
        raise ValueError(f"{address} is an address, which one process writes; use workers or a Ray cluster, not ranks.")
    if address in [argument.rstrip("/") for argument in arguments]:
        raise ValueError(f"{printable(address)} is one of the sources; choose another place for the results.")
    with working_folder(address, progress.say) as (folder, check):
        summary = label_into(folder, check)
    return at_address(summary, address, folder)


def _finish(
    run: _Run, workers: int, cluster: RayCluster | None, formats: Sequence[str], keep_empty: bool
) -> LabelSummary:
    """Do what is left of a run."""
    store, ranks = run.store, run.ranks
    with run.lock.held():
        finished = run.is_finished()
        if finished and ranks.rank > 0:
            return run.summary_of_rank()
        if not finished:
            with run.planning():
                run.work(workers, cluster)
                if ranks.rank > 0:
                    return run.summary_of_rank()
                run.wait_for_others()
            run.progress.finish()
        else:
            run.progress.say("all pictures were labelled before; those that came later need another folder")
        summary = write_results(store, run.settings, run.vocabulary.labels, formats, keep_empty)
        store.remove(PLAN)
    return summary


class _Run:
    """One process's part in a run.

    Args:
        store: Files of the run.
        job: How pictures are labelled.
        vocabulary: What to look for.
        sources: What there is to label.
        lock: Lock of the folder, for this process among those that share the work.
        progress: Where to show progress.
    """

    def __init__(
        self,
        store: LabelStore,
        job: LabelJob,
        vocabulary: Vocabulary,
        sources: Sources,
        lock: FolderLock,
        progress: LabelProgress,
    ) -> None:
        self.store, self.job, self.vocabulary, self.sources = store, job, vocabulary, sources
        self.lock, self.ranks, self.progress = lock, lock.ranks, progress
        self.plan = PlanReader(store, job.shard_size)
        self._labeler: ShardLabeler | None = None
        self._planner: Planner | None = None
        self._written: set[int] = set()
        self._next = lock.ranks.rank
        models = [job.model] if job.segmenter is None else [job.model, job.segmenter]
        if None in map(model_fingerprint, models):
            # The Hub has it, or nobody, which loading tells.
            self._labeler = self._load()
        fingerprints = [model_fingerprint(model) or "" for model in models]
        self.settings = run_settings(job, vocabulary, sources.arguments, *fingerprints)

    def is_finished(self) -> bool:
        """Return whether an earlier run of the same settings is complete, and wait for rank 0 to begin this one.

        Raises:
            ValueError: The folder holds a run with other settings.
        """
        manifest = read_manifest(self.store)
        while manifest is None and self.ranks.rank > 0:
            time.sleep(_RANK_PATIENCE)
            manifest = read_manifest(self.store)
        if manifest is None:
            return False
        check_same(manifest["settings"], self.settings, self.store)
        return bool(manifest.get("finished"))

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Begin or go on with the run, and list its pictures beside the block."""
        self.plan.refresh()
        if self.ranks.rank == 0 and not self.plan.ended:
            self.sources.check()
        self._begin()
        self._written = finished_shards(self.store)
        self.progress.resume(sum((shard_tally(self.store, number) for number in sorted(self._written)), Tally()))
        if self.ranks.rank == 0:
            self._planner = Planner(self.store, self.sources, self.job.shard_size)
            self._planner.start()
        try:
            yield
        finally:
            if self._planner is not None:
                self._planner.stop()

    def _begin(self) -> None:
        """Encode the labels once for all processes and later runs, and write the manifest if it is new."""
        if self.ranks.rank > 0:
            return
        if not self.store.exists(VOCABULARY):
            labeler = self._labeler or self._load()
            self._labeler = labeler
            self.vocabulary = labeler.detector.vocabulary(self.vocabulary)
            self.vocabulary.save(self.store.path(VOCABULARY))
        if not self.store.exists(MANIFEST):
            write_manifest(self.store, self.settings, finished=False)

    def _load(self, vocabulary: Vocabulary | None = None) -> ShardLabeler:
        device = self.job.device
        if device == "auto" and self.ranks.world > 1 and torch.cuda.device_count() > 1:
            device = f"cuda:{self.ranks.local % torch.cuda.device_count()}"
        return ShardLabeler(self.job, vocabulary or self.vocabulary, job_detector(self.job, device))

    def work(self, workers: int, cluster: RayCluster | None = None) -> None:
        """Label the shards of this rank.

        Raises:
            OSError: A shard cannot be written, or the workers cannot go on.
            ValueError: A source cannot be listed.
        """
        if not self._wait_for_plan():
            return
        digest = settings_digest(self.settings)
        pool: RayPool | WorkerPool | None = None
        if cluster is not None:
            fingerprints = (self.settings["fingerprint"], self.settings.get("segmenter_fingerprint"))
            order = LabelOrder(self.job, self.store.read(VOCABULARY), digest, *fingerprints)
            pool = RayPool(order, self.store, cluster, self.progress.say)
        threads = max(1, cores() // (workers * self.ranks.on_this_machine))
        if workers > 1:
            order = LabelOrder(self.job, self.store.read(VOCABULARY), digest)
            pool = WorkerPool(order, self.store, workers, threads, self.progress.say)
        if pool is not None:
            # The workers load models of their own.
            self._labeler = None
            pool.run(self._next_shard, self._tell)
            return
        with torch_threads(threads) if self.ranks.world > 1 else nullcontext():
            while (shard := self._next_shard()) is not NoShard.MORE:
                if isinstance(shard, Shard):
                    self._label(shard)
                else:
                    time.sleep(_PATIENCE)

    def _wait_for_plan(self) -> bool:
        """Wait for the first part of the plan, and return whether there is anything left to label.

        Raises:
            ValueError: There are no pictures.
        """
        while True:
            try:
                self._look_at_plan()
            except ValueError:
                if not self.plan.pictures:
                    self._forget()
                raise
            if self.plan.pictures:
                return True
            if self.plan.ended:
                if self.ranks.rank > 0:
                    return False
                self._forget()
                raise ValueError(nothing_found(self.sources.arguments))
            time.sleep(_PATIENCE)

    def _forget(self) -> None:
        """Remove the files of a run without a picture, so that the folder can be used with other sources."""
        self.store.remove(PLAN)
        for name in (MANIFEST, VOCABULARY):
            self.store.path(name).unlink(missing_ok=True)

    def _look_at_plan(self) -> None:
        if self._planner is not None:
            self._planner.check()
        was_ended = self.plan.ended
        self.plan.refresh()
        if self.ranks.rank > 0 and not self.plan.pictures and (read_manifest(self.store) or {}).get("finished"):
            # Rank 0 has done everything before this process was ready.
            self.plan.ended = True
        self.progress.plan(self.plan.pictures, self.plan.ended)
        if self.plan.ended and not was_ended and self.ranks.rank == 0:
            for line in self.sources.remarks:
                self.progress.say(line)

    def _next_shard(self) -> Shard | NoShard:
        """Return the next shard of this rank that is not written."""
        while True:
            if self._next >= self.plan.shards:
                self._look_at_plan()
            if self._next >= self.plan.shards:
                return NoShard.MORE if self.plan.ended else NoShard.YET
            number = self._next
            self._next += self.ranks.world
            if number in self._written or (self.ranks.rank > 0 and self.store.exists(shard_name(number))):
                continue
            try:
                return Shard(number, self.plan.items(number))
            except FileNotFoundError:
                # Rank 0 removes the plan when everything is done.
                if self.ranks.rank > 0 and (read_manifest(self.store) or {}).get("finished"):
                    return NoShard.MORE
                raise

    def _label(self, shard: Shard) -> None:
        if self._labeler is None:
            self._labeler = self._load(Vocabulary.load(self.store.path(VOCABULARY)))
        try:
            rows = self._labeler.rows(shard.items, _Counter(self._tell))
        except RuntimeError as error:
            raise WorkerError(
                f"the model cannot go on ({reason(error)}); repeat the command, which goes on where it stopped."
            ) from error
        masks = self.job.segmenter is not None
        content = encode_shard(rows, self.vocabulary.labels, settings_digest(self.settings), masks)
        self.store.write(shard_name(shard.number), content)
        self._written.add(shard.number)

    def _tell(self, tally: Tally) -> None:
        self.lock.check()
        if not self.plan.ended:
            self._look_at_plan()
        self.progress.add(tally)

    def wait_for_others(self) -> None:
        """Wait until the shards of the other ranks are written, and label those of ranks that are not at work.

        Raises:
            OSError: A shard cannot be written.
        """
        counted = {number for number in finished_shards(self.store) if number % self.ranks.world == 0}
        counted |= self._written
        while True:
            there = finished_shards(self.store)
            others = (shard_tally(self.store, number) for number in sorted(there - counted))
            self.progress.add(sum(others, Tally()))
            counted |= there
            missing = sorted(set(range(self.plan.shards)) - there)
            if not missing:
                return
            left = [number for number in missing if not self.lock.is_at_work(number % self.ranks.world)]
            if left:
                self._label(Shard(left[0], self.plan.items(left[0])))
                counted.add(left[0])
            else:
                time.sleep(_RANK_PATIENCE)

    def summary_of_rank(self) -> LabelSummary:
        """Return what this rank has done."""
        done = self.progress.done
        return LabelSummary(
            self.store.folder, done.pictures, done.boxes, done.failed, len(self._written), {}, finished=False
        )


class _Counter:
    """Tells the numbers of finished rows in the process that labels them."""

    def __init__(self, tell: Callable[[Tally], None]) -> None:
        self._tell = tell

    def reading(self, place: int) -> None:
        """Do nothing: this process cannot outlive a picture that it dies of."""

    def finished(self, rows: Sequence[tuple[int, LabelRow]]) -> None:
        self._tell(Tally.of([row for _, row in rows]))

    def done(self, places: Sequence[int], tally: Tally) -> None:
        self._tell(tally)


def output_error(error: OSError, out: Path | str) -> str:
    """Return the sentence for results that cannot be written, without its end."""
    if isinstance(error, WorkerError):
        return str(error).rstrip(".")
    why = reason(error, name_file=True)
    return (
        f"{printable(out)}: the results cannot be written ({why}); make room and repeat the command, which goes on "
        "where it stopped"
    )
