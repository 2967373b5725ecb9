"""What worker processes and machines are told about a run of labelling: job, labels, and names of files."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..detection.vocabulary import Vocabulary
from .label_settings import LabelJob, check_fingerprint
from .label_store import VOCABULARY, shard_name
from .label_workers import Tally, Watcher
from .shard_files import encode_shard, read_counts
from .shard_labels import ShardLabeler
from .source_items import SourceItem


@dataclass(frozen=True)
class LabelOrder:
    """A `ShardOrder` of labelling.

    Attributes:
        job: How pictures are labelled.
        vocabulary: Content of the vocabulary's file, with its text features.
        settings: Digest of the settings, for the shards' files.
        fingerprint: `model_fingerprint` that the model must have where it is loaded; None for any.
        segmenter_fingerprint: That of the segmenter; None for any.
    """

    job: LabelJob
    vocabulary: bytes
    settings: str
    fingerprint: str | None = None
    segmenter_fingerprint: str | None = None

    @property
    def device(self) -> str:
        """Where the model computes."""
        return self.job.device

    @property
    def key(self) -> str:
        """Text that differs between orders of other settings or models."""
        return f"{self.settings} {self.fingerprint}"

    def on(self, device: str) -> LabelOrder:
        """Return the same order for another device."""
        return replace(self, job=replace(self.job, device=device))

    def maker(self, threads: int) -> LabelMaker:
        """Load the model.

        Args:
            threads: Threads that it computes in.

        Raises:
            OSError: The model cannot be read.
            ValueError: It cannot be used, or it is not that of the fingerprint.
        """
        import torch

        torch.set_num_threads(threads)
        labeler = ShardLabeler(self.job, stored_vocabulary(self.vocabulary))
        check_fingerprint(self.job.model, self.fingerprint)
        if self.job.segmenter is not None:
            check_fingerprint(self.job.segmenter, self.segmenter_fingerprint)
        return LabelMaker(labeler, self.settings)

    def name(self, number: int) -> str:
        """Return the path of a shard's file inside the folder of results."""
        return shard_name(number)

    def tally(self, content: bytes) -> Tally:
        """Count what the file of a shard holds."""
        counts = read_counts(content)
        return Tally(counts.pictures, counts.boxes, counts.failed)


@dataclass(frozen=True)
class LabelMaker:
    """A model that labels shards.

    Attributes:
        labeler: The model.
        settings: Digest of the settings, for the shards' files.
    """

    labeler: ShardLabeler
    settings: str

    def content(self, items: Sequence[SourceItem], watcher: Watcher | None, left_out: Collection[int]) -> bytes:
        """Label the pictures of a shard, and return its file; see `ShardLabeler.rows`."""
        rows = self.labeler.rows(items, watcher, left_out)
        return encode_shard(rows, self.labeler.names, self.settings, self.labeler.job.segmenter is not None)


def stored_vocabulary(content: bytes) -> Vocabulary:
    """Return the vocabulary of a file's content."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, VOCABULARY)
        path.write_bytes(content)
        return Vocabulary.load(path)
