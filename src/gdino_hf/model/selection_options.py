"""Which boxes and labels become results: the options of the rule, checked, without torch."""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np

from .option_flags import checked_flag
from .tensor_values import as_array, is_tensor
from .text_prompt import shorten


def check_score(value: Any, name: str) -> None:
    """Raise a ValueError if an option is not a score or an IoU: a number, or an array or tensor of them, within 0..1.

    Args:
        value: The option.
        name: Its name, for the message.
    """
    if not (isinstance(value, (Real, np.ndarray)) or is_tensor(value)) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number within 0..1, got {shorten(value)}.")
    numbers = as_array(value) if is_tensor(value) else np.asarray(value)
    if not bool(((numbers >= 0) & (numbers <= 1)).all()):
        raise ValueError(f"{name} must be within 0..1, got {value}.")


@dataclass(frozen=True)
class SelectionOptions:
    """Which boxes and labels become results.

    Attributes:
        threshold: Score that results must exceed, 0..1: one for all labels, or an array or tensor (N,) with one for
            each of the N labels that may appear in results.
        text_threshold: Lowest score of a label's best token, 0..1.
        score: How the scores of a phrase's tokens are combined.
        multi_label: Whether a query may yield several labels.
        nms_threshold: IoU in 0..1 above which the lower-scoring of two boxes is dropped; 1 or None keeps both.
        class_agnostic_nms: Whether boxes of different labels also suppress each other.
        top_k: Largest number of results per image; None keeps all.
        phrases: How the scores of a label's phrases are combined, if it has several.

    Raises:
        ValueError: A value is out of its range or of another kind.
    """

    threshold: Any
    text_threshold: float = 0.0
    score: Literal["max", "mean"] = "max"
    multi_label: bool = False
    nms_threshold: float | None = None
    class_agnostic_nms: bool = False
    top_k: int | None = None
    phrases: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        for name in ("threshold", "text_threshold", "nms_threshold"):
            value = getattr(self, name)
            if value is None and name == "nms_threshold":
                continue
            check_score(value, name)
        for name in ("multi_label", "class_agnostic_nms"):
            checked_flag(getattr(self, name), name)
        for name in ("score", "phrases"):
            if getattr(self, name) not in ("max", "mean"):
                raise ValueError(f"{name} must be 'max' or 'mean', got {getattr(self, name)!r}.")
        is_count = isinstance(self.top_k, Integral) and not isinstance(self.top_k, bool) and self.top_k >= 0
        if self.top_k is not None and not is_count:
            raise ValueError(f"top_k is {shorten(self.top_k)}; give a whole number from 0, or None for all.")
