"""Detector: an exported folder with the calls and results of `gdino_hf.Detector`, without torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..detection.detection_options import DetectionOptions
from ..detection.detections import Detections
from ..detection.picture_stream import DetectionError, detect_stream, in_one_call
from ..detection.prepared_pictures import are_alike
from ..detection.tiles import OVERLAP
from ..detection.vocabulary import Labels, Vocabulary
from ..model.label_faults import warn_of_labels
from ..model.option_flags import checked_count
from ..model.text_prompt import PromptChunk
from .array_selection import ArraySelection
from .exported_folder import ExportedFolder, ExportError
from .exported_search import ExportedGraphs, ExportedQuestion, ExportedSearch, baked_question_chunk
from .prompt_tokens import PromptTokenizer


class Detector:
    """An exported model that finds what labels name.

        detector = Detector("exported")
        found = detector("street.jpg", ["cat", "remote control"])

    Several threads may share a detector.

    Args:
        folder: A folder that `gdino export` wrote in the format onnx or openvino.
        threads: Number of threads that one run uses; None leaves it to the library.

    Raises:
        ExportError: A ValueError: the folder is damaged or none, or the library that runs it is missing or too old.
        ValueError: `threads` is not a whole number from 1.
    """

    def __init__(self, folder: str | os.PathLike[str], *, threads: int | None = None) -> None:
        self.folder = ExportedFolder.read(folder)
        self.tokenizer = PromptTokenizer(self.folder)
        threads = None if threads is None else checked_count(threads, "threads")
        self._graphs = ExportedGraphs(self.folder, threads, self.tokenizer.pad_token_id)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The labels that were baked in; None if labels are given with a call."""
        baked = self.folder.labels
        return None if baked is None else tuple(each.label for each in baked)

    def vocabulary(self, labels: Labels | Vocabulary, **options: Any) -> Vocabulary:
        """Make a vocabulary, as `gdino_hf.Detector.vocabulary` does; text features are kept in the detector."""
        found = _as_vocabulary(labels, options)
        self._chunks(found)
        return found

    def __call__(
        self,
        images: Any,
        labels: Labels | Vocabulary | None = None,
        *,
        negative: Labels = (),
        batch_size: int = 1,
        tiles: int | None = None,
        overlap: float = OVERLAP,
        **options: Any,
    ) -> Any:
        """Detect objects in one picture or several.

        Args:
            images: One picture (path, http(s) address, bytes, PIL image, array, open file) or a list of them.
            labels: A vocabulary, or labels in any form that `Vocabulary` takes; None for all labels of a model whose
                labels are baked in.
            negative: Labels that compete for boxes but are left out; only with labels that are not a vocabulary.
            batch_size: Number of pictures or tiles in one run. Pictures of like shape are put together.
            tiles: Side in pixels of overlapping tiles in which larger pictures are looked at beside the whole; None
                looks at the whole alone.
            overlap: Part of a tile's side that it shares with its neighbour, in [0, 1).
            **options: `threshold`, `text_threshold`, `nms_threshold`, `class_agnostic_nms`, `top_k`, `multi_label` and
                `score`, as for `gdino_hf.Detector`.

        Returns:
            `Detections` for one picture, best first; a list of them for a list, in its order.

        Raises:
            TypeError: An input has another type, or there is no such option.
            ValueError: A picture or a label cannot be used.
        """
        search = self.search(labels, negative=negative, tiles=tiles, overlap=overlap, batch_size=batch_size, **options)
        return in_one_call(images, search, batch_size)

    def stream(
        self,
        images: Iterable[Any],
        labels: Labels | Vocabulary | None = None,
        *,
        readers: int = 1,
        ahead: int = 4,
        batch_size: int = 1,
        **options: Any,
    ) -> Iterator[tuple[Any, Detections | DetectionError]]:
        """Detect objects in any number of pictures, in their order and in bounded memory.

        Args:
            images: Pictures in any form that a call takes; a generator is read as it is needed.
            labels: As in a call.
            readers: Number of threads that read pictures while the graph runs.
            ahead: Number of pictures that are read before they are needed.
            batch_size: Number of pictures or tiles in one run.
            **options: Further arguments of a call.

        Yields:
            Each input as it was given, with its `Detections`, or with a `DetectionError` that says why there are none.

        Raises:
            TypeError: An option is unknown.
            ValueError: A label cannot be used.
        """
        search = self.search(labels, batch_size=batch_size, **options)
        return detect_stream(images, search, batch_size, are_alike, readers, ahead)

    def search(
        self,
        labels: Labels | Vocabulary | None = None,
        *,
        negative: Labels = (),
        batch_size: int = 1,
        tiles: int | None = None,
        overlap: float = OVERLAP,
        **options: Any,
    ) -> ExportedSearch:
        """Check labels and options once, for any number of pictures; the arguments are those of a call.

        Raises:
            TypeError: A label or an option has another type, or there is no such option.
            ValueError: A label or an option cannot be used.
        """
        if labels is None:
            if self.labels is None:
                raise ExportError(f"{self.folder.path} takes any labels; say what to look for, as in ['cat', 'cup'].")
            labels = list(self.labels)
        vocabulary = _as_vocabulary(labels, {"negative": negative} if len(negative) > 0 else {})
        size, choice = checked_count(batch_size, "batch_size"), DetectionOptions.of(options)
        thresholds = np.array(vocabulary.threshold_values(choice.threshold), dtype=np.float32)
        rule = choice.values_of_rule(thresholds, "mean" if vocabulary.combine == "mean" else "max")
        asked = ExportedQuestion(vocabulary.labels, self._chunks(vocabulary), ArraySelection(**rule), vocabulary.colors)
        return ExportedSearch(self._graphs, asked, tiles=tiles, overlap=overlap, batch_size=size)

    def _chunks(self, vocabulary: Vocabulary) -> tuple[PromptChunk, ...]:
        if self.folder.labels is None:
            prompt = vocabulary.prompt(self.tokenizer, int(self.folder.text["max_text_len"]))
            warn_of_labels(prompt, self.tokenizer, stacklevel=4)
            return prompt.chunks
        for entry in (*vocabulary.entries, *vocabulary.negative_entries):
            if entry.texts != (entry.label,):
                raise ExportError(
                    f"The labels of {self.folder.path} are baked in and have no other texts; leave out aliases and "
                    "templates, or export the model with them."
                )
        return (baked_question_chunk(self.folder, vocabulary.labels, vocabulary.negative_labels),)


def _as_vocabulary(labels: Labels | Vocabulary, options: dict[str, Any]) -> Vocabulary:
    if not isinstance(labels, Vocabulary):
        return Vocabulary(labels, **options)
    if options:
        raise TypeError(f"{', '.join(options)} cannot be given beside a Vocabulary; make it with them.")
    return labels
