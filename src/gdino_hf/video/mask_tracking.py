"""Objects followed by their masks: a SAM 2 video model carries them from frame to frame, a detector corrects them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from ..detection.detections import Detections
from ..detection.mask_outlines import mask_boxes
from ..model.box_ops import box_iou
from .object_memory import ObjectMemory
from .tracker_state import decode, encode, read_state, write_state

_FORMAT, _VERSION = "gdino_hf mask tracker", 1
# IoU of a box with the bounds of a mask, or with the box before it, from which it is taken for one of that object.
_SAME_AS_MASK, _SAME_AS_BOX = 0.5, 0.3
# IoU of a box with the bounds of a mask below which the mask has drifted away, so that the box prompts it anew.
_DRIFTED = 0.7
_DETECTIONS_TO_CONFIRM = 2
_SHARE_OF_LOW_SCORES = 0.5
# What a state keeps of an object beside its memory.
_KEPT = ("number", "label", "box", "score", "seconds", "detections")


@dataclass
class FollowedObject:
    """One object.

    Attributes:
        number: Its track id from 1; 0 until it was detected twice.
        label: What it is.
        box: (4,) xyxy in pixels where it was detected last.
        score: Its score there.
        seconds: When that was.
        detections: How often it was detected.
        memory: What the model remembers of it.
        mask: (height, width) bool mask in the latest frame.
        is_detected: Whether it was detected in the latest frame.
    """

    number: int
    label: str
    box: np.ndarray
    score: float
    seconds: float
    detections: int
    memory: Any
    mask: np.ndarray
    is_detected: bool = True


class MaskTracker:
    """Follows objects with a SAM 2 video model, in all frames, between detections too.

    The box of a new object prompts the model, which carries its mask from frame to frame. A later detection belongs to
    the object whose mask, or else whose last box, it overlaps most with; where the mask has drifted away from it, it
    prompts the model again. As with `Tracker`, labels are kept apart, an object has an id from its second detection on,
    and memory is bounded by the objects in view.

        tracker = MaskTracker("facebook/sam2.1-hiera-tiny")
        for frame in detector.track("clip.mp4", ["cat"], every=10, tracker=tracker):
            frame.found.masks

    Args:
        model: Hub id, folder or model object of SAM 2 or SAM 2.1 for videos (transformers' `Sam2VideoModel`).
        threshold: Score that a box must exceed to begin a track or to prompt the model again, 0..1.
        thresholds: Such a score for single labels.
        patience: Seconds after which an object that is no longer detected is given up, whether the model sees it or
            not.
        device: Device of the model; None is the first GPU or the CPU for a name, and leaves a model object where it is.
        dtype: "float32", "bfloat16" or "float16"; None for that of a model object, otherwise "float32".

    Attributes:
        name: Hub id or folder of the model.
        frames: Number of frames so far.
        seconds: Time of the latest frame; None before the first.
        count: Number of ids given so far.

    Raises:
        TypeError: The model has another type.
        ValueError: The model cannot be used, or a number is out of its range.
    """

    def __init__(
        self,
        model: Any,
        *,
        threshold: float = 0.3,
        thresholds: Mapping[str, float] | None = None,
        patience: float = 1.0,
        device: Any = None,
        dtype: str | None = None,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}; give a score from 0 to 1.")
        if not 0 < patience <= 3600:
            raise ValueError(f"patience is {patience}; give seconds, above 0 and up to 3600.")
        self.threshold, self.thresholds, self.patience = threshold, dict(thresholds or {}), patience
        self._model = ObjectMemory(model, device, dtype)
        self.name = os.fspath(model) if isinstance(model, (str, os.PathLike)) else type(model).__name__
        self.frames = self.count = 0
        self.seconds: float | None = None
        self._objects: list[FollowedObject] = []

    def update(self, found: Detections, seconds: float, image: Any) -> Detections:
        """Follow the objects into the next frame, in which objects were detected.

        Args:
            found: What was detected in it, best with scores down to half of `threshold`.
            seconds: Time of the frame, later than that of the one before.
            image: The frame as an upright RGB PIL image.

        Returns:
            The objects that have an id, with `track_ids` and `masks`: in the box of their detection, or in the bounds
            of their mask where they were not detected.
        """
        self._follow(seconds, image)
        taken = np.zeros(len(found), dtype=bool)
        labels = np.array(found.text_labels, dtype=object)
        for label in dict.fromkeys(labels):
            places = np.flatnonzero(labels == label)
            for at_least, area_of in ((_SAME_AS_MASK, lambda each: mask_bounds(each.mask)), (_SAME_AS_BOX, _last_box)):
                self._match(found, places[~taken[places]], label, seconds, area_of, at_least, taken)
        for place in np.flatnonzero(~taken):
            if found.scores[place] > self._threshold(labels[place]):
                self._begin(found, int(place), seconds)
        self._objects = [each for each in self._objects if self._is_kept(each, seconds)]
        return self._visible(found)

    def between(self, nothing: Detections, seconds: float, image: Any) -> Detections:
        """Follow the objects into the next frame, which the detector did not look at.

        Args:
            nothing: Empty detections of this frame, which tell its size and all labels.
            seconds: Time of the frame.
            image: The frame as an upright RGB PIL image.

        Returns:
            As `update` does.
        """
        self._follow(seconds, image)
        return self._visible(nothing)

    def low_thresholds(self, names: tuple[str, ...]) -> dict[str, float]:
        """Return the score, by label, above which boxes may continue a track."""
        return {name: _SHARE_OF_LOW_SCORES * self._threshold(name) for name in names}

    def _threshold(self, label: str) -> float:
        return self.thresholds.get(label, self.threshold)

    def _follow(self, seconds: float, image: Any) -> None:
        self._model.see(image, self.frames)
        for each in self._objects:
            each.mask, each.is_detected = self._model.follow(each.memory), False
        self.frames, self.seconds = self.frames + 1, seconds

    def _match(
        self,
        found: Detections,
        places: np.ndarray,
        label: str,
        seconds: float,
        area_of: Callable[[FollowedObject], np.ndarray | None],
        at_least: float,
        taken: np.ndarray,
    ) -> None:
        """Give boxes to objects of their label that were not detected yet, and mark them as taken."""
        waiting = [(each, area_of(each)) for each in self._objects if each.label == label and not each.is_detected]
        waiting = [(each, area) for each, area in waiting if area is not None]
        if not waiting or not len(places):
            return
        areas = torch.from_numpy(np.array([area for _, area in waiting], dtype=np.float32))
        overlaps = box_iou(areas, torch.from_numpy(found.boxes[places])).numpy()
        for row, column in zip(*linear_sum_assignment(overlaps, maximize=True), strict=True):
            if overlaps[row, column] < at_least:
                continue
            each, place = waiting[row][0], int(places[column])
            taken[place] = True
            each.box, each.score, each.seconds = found.boxes[place], float(found.scores[place]), seconds
            each.detections, each.is_detected = each.detections + 1, True
            if not each.number and each.detections >= _DETECTIONS_TO_CONFIRM:
                self.count += 1
                each.number = self.count
            if each.score > self._threshold(label) and _iou(mask_bounds(each.mask), each.box) < _DRIFTED:
                each.mask = self._model.prompt(each.memory, each.box)

    def _begin(self, found: Detections, place: int, seconds: float) -> None:
        memory, box = self._model.new(), found.boxes[place]
        mask = self._model.prompt(memory, box)
        label = found.text_labels[place]
        self._objects.append(FollowedObject(0, label, box, float(found.scores[place]), seconds, 1, memory, mask))

    def _is_kept(self, each: FollowedObject, seconds: float) -> bool:
        """Whether an object is followed on: a single mistake of the detector is not."""
        return each.is_detected or (each.number > 0 and seconds - each.seconds <= self.patience)

    def _visible(self, found: Detections) -> Detections:
        """Return the objects with ids that are in the latest frame."""
        rows = [
            (each, each.box if each.is_detected else mask_bounds(each.mask))
            for each in self._objects
            if each.number and each.label in found.names
        ]
        rows = [(each, box) for each, box in rows if box is not None]
        width, height = found.size
        return replace(
            found[:0],
            boxes=np.array([box for _, box in rows], dtype=np.float32).reshape(-1, 4),
            scores=np.array([each.score for each, _ in rows], dtype=np.float32),
            labels=np.array([found.names.index(each.label) for each, _ in rows], dtype=np.int64),
            masks=np.array([each.mask for each, _ in rows], dtype=bool).reshape(-1, height, width),
            track_ids=np.array([each.number for each, _ in rows], dtype=np.int64),
        )

    def state(self) -> dict[str, Any]:
        """Return all that `MaskTracker.from_state` needs to go on with equal ids and masks, as JSON can hold it.

        It has what the model remembers of each object in view, which takes megabytes.
        """
        objects = [
            {name: getattr(each, name) for name in _KEPT} | {"memory": self._model.state(each.memory)}
            for each in self._objects
        ]
        names = ("threshold", "thresholds", "patience", "frames", "count", "seconds")
        values = {name: getattr(self, name) for name in names}
        values |= {"objects": objects, "positions": self._model.positions()}
        return {"format": _FORMAT, "version": _VERSION, "tracker": self.name, "values": encode(values)}

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], model: Any, device: Any = None, dtype: str | None = None
    ) -> MaskTracker:
        """Make the tracker whose state was saved.

        Args:
            state: The state.
            model: The model that it was saved with, as for the class itself.
            device: Device of the model.
            dtype: Data type of the model.

        Raises:
            TypeError: The model has another type.
            ValueError: It is no such state, or of another version, or the model cannot be used.
        """
        if state.get("format") != _FORMAT or state.get("version") != _VERSION:
            raise ValueError(f"it is no state of a tracker by masks of version {_VERSION}")
        found = cls(model, device=device, dtype=dtype)
        if state.get("tracker") != found.name:
            raise ValueError(f"it was saved with the model {state.get('tracker')}, not with {found.name}")
        try:
            values = decode(state.get("values"))
            objects, positions = values.pop("objects"), values.pop("positions")
            if set(values) != {"threshold", "thresholds", "patience", "frames", "count", "seconds"}:
                raise ValueError("attributes are missing")
            vars(found).update(values)
            nothing = np.zeros((1, 1), dtype=bool)
            found._objects = [
                FollowedObject(
                    **{name: each[name] for name in _KEPT},
                    memory=found._model.resume(each["memory"], positions),
                    mask=nothing,
                )
                for each in objects
            ]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"it is no state of a tracker by masks: {error}") from error
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state into a JSON file, from which `MaskTracker.load` goes on.

        Raises:
            OSError: The file cannot be written.
        """
        write_state(path, self.state())

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: Any, device: Any = None, dtype: str | None = None
    ) -> MaskTracker:
        """Read a state that `save` wrote. No code in the file is run.

        Args:
            path: The file.
            model: The model that it was saved with, as for the class itself.
            device: Device of the model.
            dtype: Data type of the model.

        Raises:
            TypeError: The model has another type.
            ValueError: The file cannot be read, or holds no such state, or the model cannot be used.
        """
        return read_state(path, lambda state: cls.from_state(state, model, device, dtype))


def mask_bounds(mask: np.ndarray) -> np.ndarray | None:
    """Return the bounds of a mask, (4,) xyxy in pixels; None if it is empty."""
    return mask_boxes(mask[None], np.zeros((1, 4)))[0] if mask.any() else None


def _last_box(each: FollowedObject) -> np.ndarray:
    return each.box


def _iou(one: np.ndarray | None, other: np.ndarray) -> float:
    if one is None:
        return 0.0
    return float(box_iou(torch.from_numpy(one[None]), torch.from_numpy(other[None])))
