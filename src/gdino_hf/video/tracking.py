"""Track ids for the detections of successive frames, with the trackers of the library `trackers`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..detection.detections import Detections
from ..detection.exchange_values import kept_library
from .between_detections import Moment, moment
from .tracker_state import decode, encode, read_state, write_state

TRACKERS = {
    "bytetrack": "ByteTrackTracker",
    "ocsort": "OCSORTTracker",
    "sort": "SORTTracker",
    "botsort": "BoTSORTTracker",
    "cbiou": "CBIoUTracker",
}
"""Names of trackers, and their classes in the library."""

# Trackers that look at the pictures themselves, to compensate for the camera's motion.
_LOOKS = ("botsort",)
_VERSION = 1
# The library counts how long a track may be lost in frames of this rate.
_BUFFER_RATE = 30.0
# Frames in which an object must be found in a row before it has an id, so that single mistakes have none.
_FRAMES_TO_CONFIRM = 2
_SHARE_OF_LOW_SCORES = 0.5


class Tracker:
    """Gives detections the identity of the objects they are of.

    Each label has a tracker of its own, so that a cat never becomes a dog; ids are unique over all labels and never
    given twice. An object has an id from the second detection in a row on. Memory is bounded by the objects in view.

    Args:
        name: One of `TRACKERS`.
        threshold: Score that a box must exceed to begin a track, 0..1. Lower scores only continue one.
        thresholds: Such a score for single labels.
        patience: Seconds after which an object that is no longer found is given up; what comes back later is new.
        rate: Detections per second, to which the tracker's motion model is tuned.
        **options: Further arguments of the tracker's class, for instance `minimum_iou_threshold`.

    Attributes:
        frames: Number of frames so far, with those between detections.
        seconds: Time of the latest frame; None before the first.
        latest, before: What was tracked at the latest two detections, from which frames between them are filled.
        count: Number of ids given so far.

    Raises:
        ImportError: The library is not installed.
        TypeError: The tracker has no such option.
        ValueError: There is no such tracker, or a number is out of its range.
    """

    def __init__(
        self,
        name: str = "bytetrack",
        *,
        threshold: float = 0.3,
        thresholds: Mapping[str, float] | None = None,
        patience: float = 1.0,
        rate: float = 25.0,
        **options: Any,
    ) -> None:
        if name not in TRACKERS:
            raise ValueError(f"There is no tracker {name!r}; choose {', '.join(TRACKERS)}.")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}; give a score from 0 to 1.")
        if not 0 < patience <= 3600:
            raise ValueError(f"patience is {patience}; give seconds, above 0 and up to 3600.")
        if not 0 < rate <= 1000:
            raise ValueError(f"rate is {rate}; give detections per second, above 0 and up to 1000.")
        self.name, self.threshold, self.patience, self.rate = name, threshold, patience, rate
        self.thresholds, self._options = dict(thresholds or {}), options
        self.frames = self.count = 0
        self.seconds: float | None = None
        self.latest: Moment | None = None
        self.before: Moment | None = None
        self._trackers: dict[str, Any] = {}
        # By label, the ids of this class for those of the label's tracker.
        self._ids: dict[str, dict[int, int]] = {}
        self._make("")

    def update(self, found: Detections, seconds: float, image: Any = None) -> Detections:
        """Follow the objects into the next frame.

        Args:
            found: What was detected in it, best with scores down to half of `threshold`.
            seconds: Time of the frame, later than that of the one before.
            image: The frame as an RGB PIL image, for trackers that look at it.

        Returns:
            The detections that belong to a track, in their order, with `track_ids`.
        """
        ids = np.full(len(found), -1, dtype=np.int64)
        names, present = np.array(found.text_labels, dtype=object), set(found.text_labels)
        frame = (
            np.ascontiguousarray(np.asarray(image)[..., ::-1]) if image is not None and self.name in _LOOKS else None
        )
        for label in dict.fromkeys([*self._trackers, *found.text_labels]):
            # A label that was never found, or is out of sight for good, costs nothing.
            if label in present or self._trackers[label].tracks:
                self._follow(label, found, np.flatnonzero(names == label), seconds, frame, ids)
        self.seconds = seconds
        kept = np.flatnonzero(ids >= 0)
        tracked = replace(found[kept], track_ids=ids[kept])
        self.before, self.latest = self.latest, moment(tracked, seconds)
        return tracked

    def _follow(
        self, label: str, found: Detections, places: np.ndarray, seconds: float, frame: Any, ids: np.ndarray
    ) -> None:
        """Write the ids of one label's boxes into `ids`."""
        supervision = kept_library("supervision", "tracking needs", "video")
        if label not in self._trackers:
            self._trackers[label] = self._make(label)
        tracker = self._trackers[label]
        given = supervision.Detections(
            xyxy=found.boxes[places], confidence=found.scores[places], data={"place": places}
        )
        # Without boxes the library drops the column of places, too.
        tracked = tracker.update(given, frame=frame, timestamp=seconds)
        known = self._ids.setdefault(label, {})
        for place, own in zip(tracked.data.get("place", ()), tracked.tracker_id.tolist(), strict=True):
            if own < 0:
                continue
            if own not in known:
                self.count += 1
                known[own] = self.count
            ids[place] = known[own]
        alive = {track.tracker_id for track in tracker.tracks}
        self._ids[label] = {own: number for own, number in known.items() if own in alive}

    def _make(self, label: str) -> Any:
        """Return the library's tracker for one label."""
        library = kept_library("trackers", "tracking needs", "video")
        kind = getattr(library, TRACKERS[self.name])
        threshold = self.thresholds.get(label, self.threshold)
        accepted = inspect.signature(kind).parameters
        unknown = sorted(set(self._options) - set(accepted))
        if unknown:
            raise TypeError(f"The tracker {self.name} has no option {unknown[0]!r}; choose {', '.join(accepted)}.")
        values = {
            "lost_track_buffer": max(round(_BUFFER_RATE * self.patience), 1),
            "frame_rate": self.rate,
            "track_activation_threshold": threshold,
            "high_conf_det_threshold": threshold,
            "minimum_consecutive_frames": _FRAMES_TO_CONFIRM,
        }
        return kind(**{key: value for key, value in values.items() if key in accepted} | self._options)

    def low_thresholds(self, names: tuple[str, ...]) -> dict[str, float]:
        """Return the score, by label, above which boxes may continue a track."""
        return {name: _SHARE_OF_LOW_SCORES * self.thresholds.get(name, self.threshold) for name in names}

    def state(self) -> dict[str, Any]:
        """Return all that a later `Tracker.from_state` needs to go on with equal ids, as JSON can hold it."""
        return {
            "format": "gdino_hf tracker",
            "version": _VERSION,
            "tracker": self.name,
            "values": encode({key: value for key, value in vars(self).items() if key != "name"}),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Tracker:
        """Make the tracker whose state was saved.

        Raises:
            ImportError: The library is not installed.
            ValueError: It is no such state, or of another version.
        """
        if state.get("format") != "gdino_hf tracker" or state.get("version") != _VERSION:
            raise ValueError(f"it is no state of a tracker of version {_VERSION}")
        found = cls(str(state.get("tracker")))
        values = decode(state.get("values"))
        if not isinstance(values, dict) or set(values) != set(vars(found)) - {"name"}:
            raise ValueError("it is no state of a tracker: attributes are missing")
        vars(found).update(values)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state into a JSON file, from which `Tracker.load` goes on.

        Raises:
            OSError: The file cannot be written.
        """
        write_state(path, self.state())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tracker:
        """Read a state that `save` wrote. No code in the file is run.

        Raises:
            ImportError: The library is not installed.
            ValueError: The file cannot be read, or holds no such state.
        """
        return read_state(path, cls.from_state)
