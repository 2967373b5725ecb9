"""What worker processes and machines are told about a run of evaluation: the model, and what to look for."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..data.stored_pictures import StoredPicture
from ..detection.detector import Detector
from ..detection.text_features import TextFeatureStore
from ..evaluation.phrases import predict_phrases
from ..evaluation.predict import predict
from ..evaluation.prediction_file import PredictionLines
from .label_settings import check_fingerprint
from .label_workers import Tally, Watcher
from .shard_labels import DIED

PARTS = "parts"
"""Folder of the shards' files while an evaluation is unfinished."""

# What evaluation reads of a row.
_COLUMNS = ("image", "image_id", "caption", "spans")


@dataclass(frozen=True)
class EvaluationOrder:
    """A `ShardOrder` of evaluation. A shard's file has the lines of a `PredictionFile`.

    Attributes:
        model: "nano", Hub id, or folder.
        device: Where it computes: "auto", "cpu", "cuda", ...
        dtype: Data type of the computation.
        captions: Whether the phrases of each row's caption are looked for instead of labels.
        arguments: Further arguments of `predict`, or of `predict_phrases`.
        batch_size: Images in a forward pass.
        fingerprint: `model_fingerprint` that the model must have where it is loaded; None for any.
    """

    model: str
    device: str = "auto"
    dtype: str = "float32"
    captions: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    fingerprint: str | None = None

    @property
    def key(self) -> str:
        """Text that differs between orders of other settings or models."""
        return repr(self)

    def on(self, device: str) -> EvaluationOrder:
        """Return the same order for another device."""
        return replace(self, device=device)

    def maker(self, threads: int) -> EvaluationMaker:
        """Load the model, as `ShardOrder.maker` says."""
        import torch

        torch.set_num_threads(threads)
        detector = Detector(self.model, device=self.device, dtype=self.dtype)
        check_fingerprint(self.model, self.fingerprint)
        return EvaluationMaker(self, detector)

    def name(self, number: int) -> str:
        """Return the path of a shard's file inside the folder of the run."""
        return f"{PARTS}/{number:08d}.jsonl"

    def tally(self, content: bytes) -> Tally:
        """Count what the file of a shard holds."""
        entries = [json.loads(line) for line in content.splitlines()]
        return Tally(len(entries), 0, sum("error" in entry for entry in entries))


@dataclass
class EvaluationMaker:
    """A model that predicts shards.

    Attributes:
        order: What to predict.
        detector: The model.
    """

    order: EvaluationOrder
    detector: Detector

    @cached_property
    def _texts(self) -> TextFeatureStore:
        return TextFeatureStore(self.detector.model)

    def content(self, items: Sequence[Mapping[str, Any]], watcher: Watcher | None, left_out: Collection[int]) -> bytes:
        """Predict the rows of a shard batch by batch, and return its file.

        Args:
            items: Rows from `portable_row`.
            watcher: What to tell while it works.
            left_out: Places of rows that are not touched, because processes died of them.
        """
        places = {row["image_id"]: place for place, row in enumerate(items)}
        lines = PredictionLines()
        if watcher is not None:
            lines = _WatchedLines(watcher, places)

        def rows() -> Iterator[Mapping[str, Any]]:
            for place, row in enumerate(items):
                if watcher is not None and place not in left_out:
                    watcher.reading(place)
                yield {**row, "fault": DIED} if place in left_out else row

        common: dict[str, Any] = {"batch_size": self.order.batch_size, "store": lines, "progress": None}
        common |= self.order.arguments
        model, processor = self.detector.model, self.detector.processor
        if self.order.captions:
            predict_phrases(model, processor, rows(), **common)
        else:
            predict(model, processor, rows(), texts=self._texts, **common)
        return lines.content()


class _WatchedLines(PredictionLines):
    """Lines that tell a watcher of each image that is done, by its place among the rows of a shard."""

    def __init__(self, watcher: Watcher, places: Mapping[Any, int]) -> None:
        super().__init__()
        self._watcher, self._places = watcher, places

    def append(self, prediction: Mapping[str, Any]) -> None:
        super().append(prediction)
        self._watcher.done([self._places[prediction["image_id"]]], Tally(1, 0, "error" in prediction))


def portable_row(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return what evaluation reads of a row, in a form that other processes understand.

    Args:
        row: A row of a data set's ground truth, its picture not decoded.
        index: Its place, which is its id if it has none.
    """
    kept = {name: row[name] for name in _COLUMNS if name in row}
    if isinstance(kept.get("image"), StoredPicture):
        try:
            kept["image"] = kept["image"].column_value()
        except (OSError, ValueError) as error:
            # As if it had been read by the process that predicts.
            kept["fault"] = str(error)
    return {"image_id": index, **kept}
