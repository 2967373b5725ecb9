"""Which boxes become detections: the options of a call, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ..model.selection_options import check_score

if TYPE_CHECKING:
    from typing_extensions import Self

THRESHOLD = 0.3
"""Score that detections must exceed by default."""


@dataclass(frozen=True)
class DetectionOptions:
    """Which boxes become detections.

    Attributes:
        threshold: Score that detections must exceed, 0..1; labels may have thresholds of their own in the vocabulary.
        text_threshold: Lowest score of a label's best token, 0..1.
        nms_threshold: IoU in 0..1 above which the lower-scoring of two boxes of one label is dropped; 1 keeps both,
            None stands for the value of the model's processor.
        class_agnostic_nms: Whether boxes of different labels also suppress each other.
        top_k: Largest number of detections in a picture; None keeps all.
        multi_label: Whether one box may have several labels, each with its own score.
        score: How a label's score follows from those of its tokens: "max", or "mean" as in COCO evaluations.
    """

    threshold: float = THRESHOLD
    text_threshold: float = 0.0
    nms_threshold: float | None = None
    class_agnostic_nms: bool = False
    top_k: int | None = None
    multi_label: bool = False
    score: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        # Before it joins the thresholds of labels; `Selection` checks the rest.
        check_score(self.threshold, "threshold")

    def values_of_rule(self, thresholds: Any, phrases: Literal["max", "mean"]) -> dict[str, Any]:
        """Return the fields of `SelectionOptions` for labels with these thresholds (N,).

        Args:
            thresholds: Threshold of each label, an array or a tensor.
            phrases: How the scores of a label's phrases are combined.
        """
        return {
            "threshold": thresholds,
            "text_threshold": self.text_threshold,
            "score": self.score,
            "multi_label": self.multi_label,
            "nms_threshold": self.nms_threshold,
            "class_agnostic_nms": self.class_agnostic_nms,
            "top_k": self.top_k,
            "phrases": phrases,
        }

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Return the options of a call.

        Raises:
            TypeError: There is no option of a given name.
            ValueError: The threshold is not a number within 0..1.
        """
        unknown = sorted(set(given) - set(cls.__dataclass_fields__))
        if unknown:
            raise TypeError(f"There is no option {unknown[0]!r}; choose {', '.join(cls.__dataclass_fields__)}.")
        return cls(**given)

    def with_nms(self, nms_threshold: float | None) -> Self:
        """Return the options with a model's own `nms_threshold`, unless the call gave one."""
        return self if self.nms_threshold is not None else replace(self, nms_threshold=nms_threshold)
