"""From the pictures of a shard to its rows: reading beside the model, and batches that are always cut the same way."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from ..detection.detections import Detections
from ..detection.detector import Detector
from ..detection.prepared_pictures import PreparedPicture, are_alike, are_small_and_equal
from ..detection.stages import in_order
from ..detection.vocabulary import Vocabulary
from ..error_text import reason
from ..model.picture_limits import PictureError, PictureLimits
from ..model.picture_pixels import load_image
from ..model.remote_pictures import fetched
from .data_set_sources import SavedPictures
from .label_settings import LabelJob
from .label_workers import Watcher
from .picture_archives import ArchiveReader, open_any
from .shard_files import LabelRow
from .shard_masks import Found, ShardMasks, job_segmenter
from .source_items import SourceItem

_WEB = ("http://", "https://")
# Seconds before a picture that a server did not give is asked for again.
_PAUSES = (0.5, 2.0)
# Pictures that wait for others of their shape, in batches.
_WAITING_BATCHES = 4


class ShardLabeler:
    """A model that labels shards. The rows of a shard depend on its pictures alone.

    Args:
        job: How pictures are labelled.
        vocabulary: What to look for; with text features, they are used.
        detector: The job's model, if it is loaded already.
        read: Function that returns what `load_image` takes for an item, in any thread; None reads files and archives.

    Raises:
        ValueError: The model, the device or a label cannot be used.
    """

    def __init__(
        self,
        job: LabelJob,
        vocabulary: Vocabulary,
        detector: Detector | None = None,
        read: Callable[[SourceItem], Any] | None = None,
    ) -> None:
        self.job = job
        self.detector = detector or job_detector(job, job.device)
        segmenter = job_segmenter(job, str(self.detector.device))
        self._masks = None if segmenter is None else ShardMasks(segmenter, _failed)
        self.names = vocabulary.labels
        self._search = self.detector.search(
            vocabulary.to(self.detector.device),
            tiles=job.tiles,
            overlap=job.overlap,
            batch_size=job.batch_size if job.pad else 1,
            **job.options,
        )
        self._read = read or PictureReader()

    def rows(
        self, items: Sequence[SourceItem], watcher: Watcher | None = None, left_out: Collection[int] = ()
    ) -> list[LabelRow]:
        """Label the pictures of a shard.

        Args:
            items: The pictures.
            watcher: What to tell while it works.
            left_out: Places of pictures that are not touched, because processes died of them.

        Returns:
            A row for each picture, in order.
        """
        rows: dict[int, LabelRow] = {}

        def keep(found: Sequence[tuple[int, LabelRow]]) -> None:
            rows.update(found)
            if watcher is not None and found:
                watcher.finished(found)

        def attempt(place: int) -> tuple[int, PreparedPicture | LabelRow]:
            if place in left_out:
                return place, LabelRow(items[place].source, error=DIED)
            if watcher is not None:
                watcher.reading(place)
            return place, self._prepare(items[place])

        ahead = max(4, 2 * self.job.batch_size)
        with closing(in_order(attempt, range(len(items)), self.job.readers, ahead)) as results:
            alike = are_alike if self.job.pad else are_small_and_equal
            for found in self._label(_batches(results, keep, self.job.batch_size, alike)):
                keep(found)
        return [replace(rows[place], place=item.place) for place, item in enumerate(items)]

    def _prepare(self, item: SourceItem) -> PreparedPicture | LabelRow:
        if item.fault is not None:
            return LabelRow(item.source, error=item.fault)
        # Decoders raise exceptions of any type on damaged files.
        try:
            return self._search.prepare(load_image(self._read(item)), item.source)
        except Exception as error:
            return LabelRow(item.source, error=_why(error))

    def _label(
        self, batches: Iterable[Sequence[tuple[int, PreparedPicture]]]
    ) -> Iterator[Sequence[tuple[int, LabelRow]]]:
        """Yield the rows of batches, with masks if the job has a segmenter."""
        waiting: list[Found] = []
        for batch in batches:
            pairs = list(zip(batch, self._run([picture for _, picture in batch]), strict=True))
            yield [(place, found) for (place, _), found in pairs if isinstance(found, LabelRow)]
            found = [(*numbered, each) for numbered, each in pairs if isinstance(each, Detections)]
            if self._masks is None:
                yield [(place, LabelRow(picture.source, each)) for place, picture, each in found]
                continue
            for each in found:
                waiting.append(each)
                if len(waiting) == self._masks.at_once:
                    yield self._masks.rows(waiting)
                    waiting = []
        if self._masks is not None and waiting:
            yield self._masks.rows(waiting)

    def _run(self, batch: Sequence[PreparedPicture]) -> list[Detections | LabelRow]:
        """Run a batch; if it fails, run its pictures one by one, so that only the culprit has no detections."""
        try:
            return list(self._search(batch))
        except Exception as error:
            if len(batch) > 1 and not _is_of_the_device(error):
                return [self._run([picture])[0] for picture in batch]
            return [_failed(batch[0].source, error)]


def job_detector(job: LabelJob, device: str) -> Detector:
    """Load the detector of a job.

    Args:
        job: How pictures are labelled.
        device: Where it computes.

    Raises:
        ValueError: The model, the device or the dtype cannot be used.
    """
    return Detector(job.model, device=device, dtype=job.dtype)


DIED = "a process that worked on it died, each time it was tried; leave it out or look at it alone"
"""Reason for pictures that are left out because processes died of them."""


def _batches(
    results: Iterable[tuple[int, PreparedPicture | LabelRow]],
    keep: Any,
    size: int,
    alike: Callable[[Sequence[PreparedPicture], PreparedPicture], bool],
) -> Iterator[list[tuple[int, PreparedPicture]]]:
    """Group pictures that are alike, by their order alone and never by time; rows of failures go straight to `keep`."""
    groups: list[list[tuple[int, PreparedPicture]]] = []
    for place, result in results:
        if isinstance(result, LabelRow):
            keep([(place, result)])
            continue
        joined = next((group for group in groups if alike([each for _, each in group], result)), None)
        if joined is None:
            joined = []
            groups.append(joined)
        joined.append((place, result))
        waiting = sum(len(group) for group in groups)
        # Large pictures have no partners to wait for.
        is_full = len(joined) == size or not alike([each for _, each in joined], result)
        full = joined if is_full else groups[0] if waiting >= _WAITING_BATCHES * size else None
        if full is not None:
            groups = [group for group in groups if group is not full]
            yield full
    yield from groups


class PictureReader:
    """Reads the content of pictures, wherever they are; safe to share between threads."""

    def __init__(self) -> None:
        self._archives = ArchiveReader()
        self._saved = SavedPictures()

    def __call__(self, item: SourceItem) -> bytes | str:
        """Return a picture's content, or its path if it is a file of its own.

        A server that does not answer is asked again, after a moment.

        Args:
            item: The picture.

        Raises:
            OSError: It cannot be read.
            ValueError: It is not there, or larger than `PictureLimits` allow.
        """
        for pause in _PAUSES:
            try:
                return self._once(item)
            except Exception as error:
                if not _may_pass(error, item):
                    raise
                time.sleep(pause)
        return self._once(item)

    def _once(self, item: SourceItem) -> bytes | str:
        if item.place is None:
            return _content(item.source)
        kind, *place = item.place
        if kind == "tar":
            return self._archives.member(*place)
        if kind == "saved":
            return self._saved(*place)
        content = self._archives.row(*place)
        return _content(content) if isinstance(content, str) else content


def _content(source: str) -> bytes | str:
    if source.lower().startswith(_WEB):
        return fetched(source)
    if "://" not in source:
        return source
    with closing(open_any(source)) as file:
        # One byte more than the limit, so that a larger file is refused without being read as a whole.
        content: bytes = file.read(PictureLimits.current().bytes + 1)
    return content


def _may_pass(error: Exception, item: SourceItem) -> bool:
    """Return whether a failure of reading may be over in a moment."""
    if "://" not in item.source:
        return False
    if isinstance(error, PictureError):
        code = getattr(error.__cause__, "code", None)
        return error.kind == "address" and (code is None or code == 429 or code >= 500)
    return isinstance(error, OSError) and not isinstance(error, (FileNotFoundError, PermissionError))


def _is_of_the_device(error: Exception) -> bool:
    """Return whether every further picture would fail as well, because the device is lost to this process."""
    import torch

    lost = getattr(torch, "AcceleratorError", None)
    return (lost is not None and isinstance(error, lost)) or "CUDA error" in str(error)


def _failed(source: str, error: Exception) -> LabelRow:
    """Return the row of a picture that cannot be labelled; the loss of the device is raised."""
    if _is_of_the_device(error):
        raise error
    return LabelRow(source, error=_why(error))


def _why(error: Exception) -> str:
    return reason(error, name_file=True, most_lines=3)
