"""Token scores to results with numpy, by the rule that `gdino_hf.model.grounded_results` applies to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..detection.suppression import suppressed
from ..model.selection_options import SelectionOptions
from ..model.text_prompt import PromptChunk


@dataclass(frozen=True)
class LabelScores:
    """Scores of the labels of one prompt.

    Attributes:
        labels: (N,) index of each of the prompt's labels.
        scores: (Q, N) score of each label for each query, 0..1.
        peaks: (Q, N) score of each label's best token.
    """

    labels: np.ndarray
    scores: np.ndarray
    peaks: np.ndarray


@dataclass(frozen=True)
class Found:
    """Results: boxes (N, 4) xyxy, scores (N,) and indices of labels (N,)."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def at(self, places: np.ndarray) -> Found:
        """Return the results at some places."""
        return Found(self.boxes[places], self.scores[places], self.labels[places])


@dataclass(frozen=True)
class ArraySelection(SelectionOptions):
    """Which boxes and labels become results; the attributes are those of `SelectionOptions`."""

    def scored(self, logits: np.ndarray, chunk: PromptChunk) -> LabelScores:
        """Compute the scores of one prompt's labels from its token logits (Q, T)."""
        with np.errstate(over="ignore"):
            probabilities = 1 / (1 + np.exp(-logits.astype(np.float32)))
        peaks = np.stack([probabilities[:, start:end].max(-1) for start, end in chunk.spans], axis=-1)
        scores = peaks
        if self.score == "mean":
            scores = np.stack([probabilities[:, start:end].mean(-1) for start, end in chunk.spans], axis=-1)
        owners = chunk.label_indices
        labels = list(dict.fromkeys(owners))
        if len(labels) < len(owners):
            columns = [[place for place, owner in enumerate(owners) if owner == label] for label in labels]
            together = np.mean if self.phrases == "mean" else np.max
            peaks = np.stack([peaks[:, of_one].max(-1) for of_one in columns], axis=-1)
            scores = np.stack([together(scores[:, of_one], axis=-1) for of_one in columns], axis=-1)
        return LabelScores(np.array(labels, dtype=np.int64), scores, peaks)

    def select(self, found: LabelScores, boxes: np.ndarray, num_positives: int) -> Found:
        """Select the queries and labels of one prompt that pass; boxes (Q, 4) are cxcywh and become xyxy."""
        positive = found.labels < num_positives
        thresholds = np.broadcast_to(np.asarray(self.threshold, dtype=np.float32), (num_positives,))
        passed = (found.scores > thresholds[found.labels.clip(max=num_positives - 1)]) & positive
        if self.multi_label:
            query, column = (passed & (found.peaks >= self.text_threshold)).nonzero()
        else:
            # A query gets its best label that passes, unless a negative label has a higher score.
            candidates = np.where(passed | ~positive, found.scores, np.float32(-1))
            winner = candidates.argmax(-1)
            every = np.arange(len(winner))
            allowed = (candidates[every, winner] >= 0) & positive[winner]
            query = (allowed & (found.peaks[every, winner] >= self.text_threshold)).nonzero()[0]
            column = winner[query]
        centers, halves = boxes[query, :2].astype(np.float32), boxes[query, 2:].astype(np.float32) * np.float32(0.5)
        corners = np.concatenate([centers - halves, centers + halves], axis=-1)
        return Found(corners, found.scores[query, column], found.labels[column])

    def merged(self, parts: Sequence[Found], size: tuple[int, int]) -> Found:
        """Merge the results of all prompts, best first, with boxes in pixels of a picture (width, height)."""
        boxes, scores, labels = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("boxes", "scores", "labels")
        )
        found = Found(boxes * np.array([*size, *size], dtype=np.float32), scores, labels)
        if self.nms_threshold is not None and self.nms_threshold < 1:
            classes = None if self.class_agnostic_nms else found.labels
            found = found.at(suppressed(found.boxes, found.scores, classes, self.nms_threshold))
        return found.at(np.argsort(-found.scores, kind="stable")[: self.top_k])
