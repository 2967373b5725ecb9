"""Detector: an exported folder with the calls and results of `gdino_hf.Detector`, without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..detection.baked_labels import in_baked_prompt
from ..detection.detection_options import DetectionOptions
from ..detection.detector_calls import DetectorCalls, as_vocabulary
from ..detection.exported_folder import ExportedFolder
from ..detection.vocabulary import Labels, Vocabulary
from ..model.label_faults import warn_of_labels
from ..model.option_flags import checked_count
from ..model.text_prompt import PromptChunk
from .array_selection import ArraySelection
from .exported_search import ExportedGraphs, ExportedQuestion, ExportedSearch
from .prompt_tokens import PromptTokenizer


class Detector(DetectorCalls[ExportedSearch]):
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
        return None if self.folder.labels is None else self.folder.labels.names

    def vocabulary(self, labels: Labels | Vocabulary, **options: Any) -> Vocabulary:
        """Make a vocabulary, as `gdino_hf.Detector.vocabulary` does; text features are kept in the detector."""
        found = as_vocabulary(labels, options)
        self._chunks(found)
        return found

    def _search_for(self, vocabulary: Vocabulary, options: Mapping[str, Any], **tiling: Any) -> ExportedSearch:
        choice = DetectionOptions.of(options).with_nms(self.folder.nms_threshold)
        thresholds = np.array(vocabulary.threshold_values(choice.threshold), dtype=np.float32)
        rule = choice.values_of_rule(thresholds, "mean" if vocabulary.combine == "mean" else "max")
        asked = ExportedQuestion(vocabulary.labels, self._chunks(vocabulary), ArraySelection(**rule), vocabulary.colors)
        return ExportedSearch(self._graphs, asked, **tiling)

    def _chunks(self, vocabulary: Vocabulary) -> tuple[PromptChunk, ...]:
        prompt = vocabulary.prompt(self.tokenizer, int(self.folder.text["max_text_len"]))
        chunks = prompt.chunks if self.labels is None else in_baked_prompt(self.folder, prompt, self.tokenizer)
        warn_of_labels(prompt, self.tokenizer, stacklevel=5)
        return chunks
