"""Stored outputs of models: thresholds turn them into detections without running a model again."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gdino_hf import Detections
from gdino_hf.detection.detections import Detection
from gdino_hf.detection.prompt_passes import Asked, Options, ScoredPicture
from gdino_hf.detection.tiles import Area, merge_tiles
from gdino_hf.model.box_ops import box_scale
from gdino_hf.model.grounded_results import LabelledRow, Selection

from .masks import PictureMasks
from .queries import Query
from .safety import KEPT_SECONDS

KEPT_BYTES = 256 * 2**20
"""Default memory for stored outputs, in bytes."""
MOST_CANDIDATES = 400
"""Number of boxes of the picture and its tiles that are merged; of more, those with the highest scores."""

Rows = tuple[tuple[tuple[Tensor, Tensor], ...], ...]
"""For the picture and each of its tiles, the token logits (Q, T) and boxes (Q, 4) of each prompt."""


@dataclass(frozen=True)
class Settings:
    """How stored outputs become detections.

    Attributes:
        threshold: Detections have a higher score than this, in 0..1; labels may have a threshold of their own.
        nms: IoU above which non-maximum suppression removes the lower-scoring of two boxes of one label; 1 keeps all.
        text_threshold: Smallest score of a label's best word, in 0..1.
        hidden: Labels whose detections are not shown.
    """

    threshold: float
    nms: float = 1.0
    text_threshold: float = 0.0
    hidden: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Outputs:
    """A model's outputs for one picture, before any threshold.

    Attributes:
        model: Name of the model on the page.
        query: What the visitor asked for.
        asked: What to look for in the model's tokens.
        name: Name of the picture.
        data: File content of the picture.
        size: (width, height) of the picture in pixels.
        tiles: Areas of the picture's tiles.
        rows: Outputs for the picture and its tiles, on the CPU.
        seconds: Duration of preprocessing and forward passes.
        device: Name of the device that ran the model.
        backend: Name of the implementation of deformable attention.
        remarks: What is odd about the labels, one sentence each.
        masks: Makes the masks of what is shown; None for no masks.
    """

    model: str
    query: Query
    asked: Asked
    name: str
    data: bytes
    size: tuple[int, int]
    tiles: tuple[Area, ...]
    rows: Rows
    seconds: float
    device: str
    backend: str
    remarks: tuple[str, ...] = ()
    masks: PictureMasks | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, or the phrases of the caption."""
        return self.asked.names

    def detections(self, settings: Settings) -> Detections:
        """Return the detections for some settings, best first, without running the model.

        Raises:
            Refused: There are too many boxes to make masks of.
        """
        found = self._detections(settings, self._selection(settings))
        return found if self.masks is None else self.masks.add(found)

    def best(self) -> Detection | None:
        """Return the best candidate, below every threshold too, or None; the page names it if it found nothing."""
        settings = Settings(threshold=0.0)
        select = replace(self._selection(settings), threshold=torch.zeros(len(self.labels)))
        return next(iter(self._detections(settings, select)), None)

    def own_threshold(self, label: str) -> float | None:
        """Return the threshold that a label has in its vocabulary file, or None."""
        entries = () if self.query.vocabulary is None else self.query.vocabulary.entries
        return next((entry.threshold for entry in entries if entry.label == label), None)

    @property
    def num_bytes(self) -> int:
        """Memory in bytes that storing these outputs takes."""
        tensors = (x for rows in self.rows for row in rows for x in row)
        kept = 0 if self.masks is None else self.masks.num_bytes
        return len(self.data) + sum(x.numel() * x.element_size() for x in tensors) + kept

    def _detections(self, settings: Settings, select: Selection) -> Detections:
        asked = replace(self.asked, select=select)
        whole, *parts = (
            self._found(asked, area, rows)
            for area, rows in zip(((0, 0, *self.size), *self.tiles), self.rows, strict=True)
        )
        if parts:
            whole, *parts = _best([whole, *parts])
            whole = merge_tiles(list(zip(self.tiles, parts, strict=True)), whole)
        return whole[np.array([name not in settings.hidden for name in whole.text_labels], dtype=bool)]

    def _selection(self, settings: Settings) -> Selection:
        options = Options(
            threshold=settings.threshold,
            text_threshold=settings.text_threshold,
            nms_threshold=settings.nms,
            # A box of a sentence that is one prompt may have several phrases.
            multi_label=self.query.vocabulary is None,
        )
        if self.query.vocabulary is not None:
            return options.selection(self.query.vocabulary)
        return options.rule(torch.full((len(self.labels),), settings.threshold), "max")

    def _found(self, asked: Asked, area: Area, rows: tuple[tuple[Tensor, Tensor], ...]) -> Detections:
        """Return the detections in the picture or in one of its tiles, in its own pixels."""
        size = area[2] - area[0], area[3] - area[1]
        scored = ScoredPicture(asked, size, self.name)
        for chunk, (logits, boxes) in zip(asked.chunks, rows, strict=True):
            scored.add(logits, boxes, LabelledRow(0, chunk.label_indices, chunk.spans))
        scored.finish(box_scale([size[::-1]], torch.empty(1, 0, 4))[0])
        return scored.detections()


def _best(parts: list[Detections]) -> list[Detections]:
    """Return the boxes with the highest scores, since merging compares every box with every other."""
    scores = np.concatenate([part.scores for part in parts])
    if len(scores) <= MOST_CANDIDATES:
        return parts
    lowest = np.partition(scores, -MOST_CANDIDATES)[-MOST_CANDIDATES]
    return [part[part.scores >= lowest] for part in parts]


class KeptOutputs:
    """Store of the outputs of recent requests, by keys that cannot be guessed.

    The browser holds only the key, so nothing that it sends back needs to be trusted.

    Args:
        most_bytes: Largest size of all outputs together in bytes; beyond it the least recently used are removed.
        seconds: How long outputs are kept after their last use.
    """

    def __init__(self, most_bytes: int = KEPT_BYTES, seconds: float = KEPT_SECONDS) -> None:
        self._most_bytes, self._seconds = most_bytes, seconds
        self._entries: OrderedDict[str, tuple[float, Outputs]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, outputs: Outputs, replaces: str | None = None) -> str:
        """Store outputs.

        Args:
            outputs: The outputs to store.
            replaces: Key of the outputs that the same visitor saw before, which are removed.

        Returns:
            The key of the stored outputs.
        """
        key = secrets.token_urlsafe(16)
        with self._lock:
            self._entries.pop(replaces or "", None)
            self._entries[key] = (time.monotonic(), outputs)
            self._drop_old()
        return key

    def get(self, key: str | None) -> Outputs | None:
        """Return stored outputs, or None if they were removed or never stored."""
        with self._lock:
            self._drop_old()
            entry = self._entries.get(key or "")
            if entry is None:
                return None
            self._entries[key or ""] = (time.monotonic(), entry[1])
            self._entries.move_to_end(key or "")
            return entry[1]

    def __len__(self) -> int:
        return len(self._entries)

    def sweep(self) -> None:
        """Remove expired outputs; called regularly, so that they are removed even if no further requests come."""
        with self._lock:
            self._drop_old()

    def _drop_old(self) -> None:
        total = sum(outputs.num_bytes for _, outputs in self._entries.values())
        oldest = time.monotonic() - self._seconds
        while self._entries:
            used, outputs = next(iter(self._entries.values()))
            # The newest stays even if it alone is too large, because its visitor is looking at it.
            if used >= oldest and (total <= self._most_bytes or len(self._entries) == 1):
                return
            self._entries.popitem(last=False)
            total -= outputs.num_bytes
