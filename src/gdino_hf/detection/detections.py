"""Detections: what was found in one picture, as arrays that can be filtered, drawn and written in every format."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..model.option_flags import checked_flag
from ..model.text_prompt import shorten
from .detection_formats import DetectionFormats
from .suppression import suppressed

_PER_BOX = ("boxes", "scores", "labels", "masks", "track_ids", "token_scores", "spans")


class Detection(NamedTuple):
    """One box: (x1, y1, x2, y2) in pixels, its score in 0..1, the index of its label, and the label's text."""

    box: tuple[float, float, float, float]
    score: float
    label: int
    text_label: str


@dataclass(frozen=True, eq=False, repr=False)
class Detections(DetectionFormats):
    """What was found in one picture.

    Boxes lie within the picture: a side that a model places outside is moved to the edge.

    Attributes:
        boxes: (N, 4) float32 xyxy in pixels of the upright picture.
        scores: (N,) float32 in 0..1.
        labels: (N,) int64 index into `names`.
        names: All labels that were asked for, negative labels not among them.
        size: (width, height) of the upright picture in pixels.
        presence: Highest score that each label has anywhere in the picture, found or not; None if unknown.
        source: Path, address or other name of the picture; None if it has none.
        masks: (N, height, width) bool masks at the picture's size; None without a segmenter.
        track_ids: (N,) int64 identity of each box in a video; None outside of videos.
        spans: For each box the (start, end) characters of its phrase in `caption`; None without a caption.
        token_scores: For each box the score of each token of its phrase, (text, score) pairs; None without a caption.
        caption: The text that `spans` index; None without a caption.
        colors: "#rrggbb" of labels that have a colour of their own, by label.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    size: tuple[int, int]
    presence: Mapping[str, float] | None = None
    source: str | None = None
    masks: np.ndarray | None = None
    track_ids: np.ndarray | None = None
    spans: tuple[tuple[tuple[int, int], ...], ...] | None = None
    token_scores: tuple[tuple[tuple[str, float], ...], ...] | None = None
    caption: str | None = None
    colors: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        put = object.__setattr__
        width, height = (int(side) for side in self.size)
        if width < 1 or height < 1:
            raise ValueError(f"size is {self.size}; give (width, height) of the picture in pixels.")
        boxes = np.array(self.boxes, dtype=np.float32).reshape(-1, 4)
        if not np.isfinite(boxes).all():
            raise ValueError("A box has a side that is not a finite number; leave it out.")
        put(self, "size", (width, height))
        put(self, "boxes", np.clip(boxes, 0, np.array([width, height, width, height], dtype=np.float32)))
        put(self, "scores", np.asarray(self.scores, dtype=np.float32).reshape(-1))
        put(self, "labels", np.asarray(self.labels, dtype=np.int64).reshape(-1))
        put(self, "names", tuple(self.names))
        if self.track_ids is not None:
            put(self, "track_ids", np.asarray(self.track_ids, dtype=np.int64).reshape(-1))
        for name in _PER_BOX:
            value = getattr(self, name)
            if value is not None and len(value) != len(boxes):
                raise ValueError(f"There are {len(value)} {name} for {len(boxes)} boxes; give one for each box.")
        if self.labels.size and not 0 <= self.labels.min() <= self.labels.max() < len(self.names):
            raise ValueError(
                f"A label is {int(self.labels.max())} or {int(self.labels.min())}, but there are {len(self.names)} "
                "names; labels are indices into names."
            )
        if self.masks is not None:
            masks = np.asarray(self.masks, dtype=bool)
            if masks.shape[1:] != (height, width):
                raise ValueError(f"masks is {masks.shape}; give ({len(boxes)}, {height}, {width}), the picture's size.")
            put(self, "masks", masks)

    @classmethod
    def none(cls, names: Sequence[str], size: tuple[int, int], **values: Any) -> Detections:
        """Return the detections of a picture in which nothing was found.

        Args:
            names: All labels that were asked for.
            size: (width, height) of the picture in pixels.
            **values: Any other attribute.
        """
        nothing = np.zeros(0, dtype=np.float32)
        return cls(nothing.reshape(0, 4), nothing, np.zeros(0, dtype=np.int64), tuple(names), size, **values)

    @property
    def text_labels(self) -> list[str]:
        """The caller's own text of each box's label."""
        return [self.names[index] for index in self.labels]

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        shown = ", ".join(f"{found.text_label} {found.score:.2f}" for found in list(self)[:5])
        more = f", and {len(self) - 5} more" if len(self) > 5 else ""
        width, height = self.size
        return f"Detections({len(self)} in {width}x{height} pixels: {shown or 'nothing'}{more})"

    def __iter__(self) -> Iterator[Detection]:
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True)
        for box, score, label in rows:
            yield Detection(tuple(box), score, label, self.names[label])

    def __getitem__(self, chosen: int | slice | Sequence[int] | np.ndarray) -> Detections:
        """Return some of the boxes, chosen by index, slice, list of indices or bool mask."""
        places = np.arange(len(self))
        picked = places[[chosen]] if isinstance(chosen, (int, np.integer)) else places[_index(chosen)]
        values: dict[str, Any] = {}
        for name in _PER_BOX:
            value = getattr(self, name)
            if value is not None:
                values[name] = value[picked] if isinstance(value, np.ndarray) else tuple(value[i] for i in picked)
        return replace(self, **values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Detections):
            return NotImplemented
        return all(_same(getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)

    __hash__ = None  # type: ignore[assignment]

    def filter(
        self,
        *,
        threshold: float | None = None,
        labels: Iterable[str] | str | None = None,
        min_area: float = 0.0,
    ) -> Detections:
        """Keep the boxes that pass every condition.

        Args:
            threshold: Score that boxes must exceed, 0..1.
            labels: Labels to keep; all by default.
            min_area: Smallest area in square pixels.

        Returns:
            The boxes that pass, in the same order.

        Raises:
            ValueError: A label is not among `names`.
        """
        keep = self.areas >= min_area
        if threshold is not None:
            keep &= self.scores > threshold
        if labels is not None:
            wanted = {labels} if isinstance(labels, str) else set(labels)
            unknown = sorted(wanted - set(self.names))
            if unknown:
                raise ValueError(f"{shorten(unknown[0])} was not asked for; the labels are {', '.join(self.names)}.")
            keep &= np.array([name in wanted for name in self.names], dtype=bool)[self.labels]
        return self[keep]

    def nms(self, iou: float = 0.5, class_agnostic: bool = False) -> Detections:
        """Apply non-maximum suppression.

        Args:
            iou: IoU in 0..1 above which the lower-scoring of two boxes is dropped.
            class_agnostic: Whether boxes of different labels also suppress each other.

        Returns:
            The boxes that stay, best first.
        """
        all_together = checked_flag(class_agnostic, "class_agnostic")
        return self[suppressed(self.boxes, self.scores, None if all_together else self.labels, iou)]

    def sort(self, by: str = "score") -> Detections:
        """Sort the boxes.

        Args:
            by: "score" (best first), "area" (largest first), "label" (in the order of `names`), or "position" (from
                left to right).

        Returns:
            The same boxes in that order; ties keep theirs.
        """
        keys = {"score": -self.scores, "area": -self.areas, "label": self.labels, "position": self.boxes[:, 0]}
        if by not in keys:
            raise ValueError(f"Boxes cannot be sorted by {by!r}; choose {', '.join(keys)}.")
        return self[np.argsort(keys[by], kind="stable")]

    @property
    def areas(self) -> np.ndarray:
        """(N,) area of each box in square pixels."""
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        return sides[:, 0] * sides[:, 1]

    def plot(self, image: Any = None, **options: Any) -> Any:
        """Draw the boxes, and the masks if there are any, on the picture.

        Args:
            image: The picture in any form that `Detector` takes; None reads `source`.
            **options: Options of `gdino_hf.visualize.draw_detections`.

        Returns:
            A new PIL image.

        Raises:
            ValueError: There is no picture, or it has another size.
        """
        from ..model.picture_pixels import load_image
        from ..model.remote_pictures import downloaded
        from ..visualize import draw_detections

        given = self.source if image is None else image
        if given is None:
            raise ValueError("The picture these boxes were found in has no name; give it: found.plot(image).")
        picture = load_image(downloaded(given))
        if picture.size != self.size:
            raise ValueError(
                f"The picture is {picture.width}x{picture.height} pixels, but these boxes are from one of "
                f"{self.size[0]}x{self.size[1]}; give that one."
            )
        return draw_detections(picture, self.as_result(), colors=self.colors, **options)

    def as_result(self) -> dict[str, Any]:
        """Return what `post_process_grounded_object_detection` returns for one picture, with arrays for tensors."""
        found = {"scores": self.scores, "boxes": self.boxes, "text_labels": self.text_labels, "labels": self.labels}
        return found if self.masks is None else {**found, "masks": self.masks}


def _index(chosen: Any) -> Any:
    """Return an index that numpy reads as meant: an empty list is no float array."""
    if isinstance(chosen, slice):
        return chosen
    array = np.asarray(chosen)
    return array.astype(np.int64) if array.size == 0 and array.dtype != bool else array


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return one is not None and other is not None and np.array_equal(one, other)
    return bool(one == other)


def name_of(source: Any) -> str | None:
    """Return the name of an input, if it has one."""
    if isinstance(source, str):
        return source if len(source) < 1000 else None
    return os.fspath(source) if isinstance(source, os.PathLike) else getattr(source, "filename", None) or None
