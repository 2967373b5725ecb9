"""A detector over a source of frames: detections with track ids, frame after frame, in bounded memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from ..detection.detection_options import THRESHOLD
from ..detection.detections import Detections
from ..detection.prepared_pictures import SMALL_PICTURES, PreparedPicture, are_alike, are_small_and_equal
from ..detection.search import MaskMaker, Search
from ..detection.stages import in_batches
from ..detection.vocabulary import Labels, Vocabulary
from ..model.option_flags import checked_count
from .between_detections import between, moment
from .decoding import VideoFrame
from .frame_sources import FrameSource, open_source
from .mask_tracking import MaskTracker
from .tracking import TRACKERS, Tracker

LARGEST_STRIDE = 120
"""Most frames from one detection to the next, because those between them wait in memory."""

NMS_THRESHOLD = 0.7
"""IoU above which the lower-scoring of two boxes of one label is dropped by default: two boxes would be two tracks."""

# An object must be missed this many times before it is given up, however seldom the model looks.
_DETECTIONS_OF_PATIENCE = 3
_FRAMES_AT_ONCE = 16
_FRAMES_AHEAD = 4


class Searcher(Protocol):
    """A `Detector`, or what stands before one."""

    @property
    def device(self) -> Any:
        """The model's device."""

    def search(self, labels: Vocabulary, **options: Any) -> Any:
        """Return a `Search`, or an object with its `asked`, `lanes`, `prepare`, `in_lanes` and call."""


class VideoWarning(UserWarning):
    """A video of which something was missing or damaged; the message says what."""


@dataclass(frozen=True)
class TrackedFrame:
    """One frame with the objects in it.

    Attributes:
        number: Index of the frame in its source, from 0.
        seconds: Time at which it is shown, from the start of its source.
        image: Upright RGB picture.
        found: Detections of the objects that are tracked, with `track_ids`.
        detected: Whether the model looked at this frame; otherwise the boxes are placed between detections.
    """

    number: int
    seconds: float
    image: Image.Image
    found: Detections
    detected: bool


class _Step(NamedTuple):
    """A frame on its way: its place among all frames of the tracker, its time there, and the model's inputs."""

    place: int
    time: float
    frame: VideoFrame
    prepared: PreparedPicture | None


def track(
    detector: Searcher,
    source: Any,
    labels: Labels | Vocabulary,
    *,
    tracker: str | Tracker | MaskTracker = "bytetrack",
    every: int = 1,
    batch_size: int | None = None,
    threshold: float = THRESHOLD,
    patience: float = 1.0,
    rate: float | None = None,
    start: float = 0.0,
    end: float | None = None,
    **options: Any,
) -> Generator[TrackedFrame, None, None]:
    """Follow the objects that labels name through a video.

    Text is encoded once. Frames are decoded beside the model. Memory does not grow with the length of the video.

    Args:
        detector: The detector.
        source: Anything that `gdino_hf.video.frame_sources.open_source` takes: a video, a folder of pictures, "webcam",
            an address such as rtsp://camera/1, or an iterable of pictures.
        labels: A vocabulary, or labels in any form that `Vocabulary` takes.
        tracker: Name of a tracker, see `gdino_hf.video.tracking.TRACKERS`; Hub id or folder of a SAM 2 video model,
            which makes masks, too; or a `Tracker` or a `MaskTracker`, which goes on from what it has seen and can be
            saved afterwards. It has a threshold and a patience of its own.
        every: Number of frames from one detection to the next. A SAM 2 video model follows the objects through those
            between; other trackers interpolate their boxes. Up to `LARGEST_STRIDE`.
        batch_size: Number of frames in one forward pass. None takes up to four small ones on a CPU, otherwise one.
        threshold: Score that a box must exceed to begin a track, 0..1, unless the vocabulary has one for its label.
            Boxes down to half of it continue a track.
        patience: Seconds after which an object that is no longer found is given up.
        rate: Frames per second of pictures; a video tells its own.
        start: Time in seconds of the first frame.
        end: Time in seconds before which frames are yielded; None for all.
        **options: Further options of `Detector.search`, such as `negative`, `tiles` and `nms_threshold`.

    Yields:
        Each frame as a `TrackedFrame`. A `VideoWarning` says at the end if something was missing or damaged.

    Raises:
        ImportError: PyAV or the library of trackers is not installed.
        TypeError: The source or an option has another type.
        ValueError: The source, a label or an option cannot be used.
    """
    every = checked_count(every, "every")
    at_once = SMALL_PICTURES if detector.device.type == "cpu" else 1
    at_once = at_once if batch_size is None else checked_count(batch_size, "batch_size")
    if every > LARGEST_STRIDE:
        raise ValueError(f"every is {every}; give at most {LARGEST_STRIDE}, because frames in between wait in memory.")
    opened = open_source(source, rate=rate, start=start, end=end)
    vocabulary = _vocabulary(labels, options)
    if isinstance(tracker, str):
        tracker = make_tracker(
            tracker,
            vocabulary,
            opened,
            every=every,
            threshold=threshold,
            patience=patience,
            device=detector.device,
        )
    segmenter = getattr(detector, "segmenter", None)
    if isinstance(tracker, MaskTracker) and segmenter is not None:
        raise ValueError("The tracker makes masks, and so does detector.segmenter; set detector.segmenter to None.")
    search = low_search(detector, vocabulary, tracker, batch_size=at_once, **options)
    if segmenter is not None:
        # Boxes that become no track need no mask.
        search.segmenter = None
    # Frames between detections travel with them, few at a time, because all wait in memory.
    size = at_once * every if at_once * every <= _FRAMES_AT_ONCE else 1
    alike = are_small_and_equal if batch_size is None and detector.device.type == "cpu" else are_alike
    return _tracked(opened, search, segmenter, tracker, every, size, alike)


def _vocabulary(labels: Labels | Vocabulary, options: dict[str, Any]) -> Vocabulary:
    if isinstance(labels, Vocabulary):
        return labels
    return Vocabulary(labels, negative=options.pop("negative", ()))


def make_tracker(
    name: str,
    vocabulary: Vocabulary,
    source: FrameSource,
    *,
    every: int,
    threshold: float,
    patience: float,
    device: Any = None,
    dtype: str | None = None,
) -> Tracker | MaskTracker:
    """Make the tracker of a run, tuned to the rate of its detections.

    Args:
        name: One of `gdino_hf.video.tracking.TRACKERS`, or Hub id or folder of a SAM 2 video model.
        vocabulary: The labels, whose own thresholds come before `threshold`.
        source: The frames.
        every: Number of frames from one detection to the next.
        threshold: Score that a box must exceed to begin a track, 0..1.
        patience: Seconds after which an object that is no longer found is given up.
        device: Device of a SAM 2 video model, as for `MaskTracker`.
        dtype: Data type of a SAM 2 video model, as for `MaskTracker`.

    Raises:
        ImportError: The library of trackers is not installed.
        ValueError: There is no such tracker, or a number is out of its range.
    """
    rate = min(max(source.rate / every, 0.01), 1000.0)
    own = {entry.label: entry.threshold for entry in vocabulary.entries if entry.threshold is not None}
    patience = max(patience, _DETECTIONS_OF_PATIENCE / rate) if patience > 0 else patience
    if is_model_name(name):
        return MaskTracker(name, threshold=threshold, thresholds=own, patience=patience, device=device, dtype=dtype)
    return Tracker(name, threshold=threshold, thresholds=own, patience=patience, rate=rate)


def is_model_name(tracker: str) -> bool:
    """Whether the name of a tracker is a Hub id or a folder of a SAM 2 video model."""
    return tracker not in TRACKERS and ("/" in tracker or Path(tracker).is_dir())


def low_search(detector: Searcher, vocabulary: Vocabulary, tracker: Tracker | MaskTracker, **options: Any) -> Search:
    """Return a search that also finds the boxes with low scores that only continue tracks.

    Args:
        detector: The detector.
        vocabulary: The labels.
        tracker: The tracker of the run.
        **options: Options of `Detector.search`.

    Raises:
        TypeError: An option has another type, or there is no such option.
        ValueError: A label or an option cannot be used.
    """
    lowered = vocabulary.with_thresholds(tracker.low_thresholds(vocabulary.labels))
    search: Search = detector.search(lowered, **{"nms_threshold": NMS_THRESHOLD} | options)
    return search


def _tracked(
    source: FrameSource,
    search: Search,
    segmenter: MaskMaker | None,
    tracker: Tracker | MaskTracker,
    every: int,
    size: int,
    alike: Callable[[Sequence[PreparedPicture], PreparedPicture], bool],
) -> Generator[TrackedFrame, None, None]:
    def prepare(step: _Step) -> _Step:
        if step.place % every:
            return step
        return step._replace(prepared=search.prepare(step.frame.image))

    def can_join(batch: list[_Step], step: _Step) -> bool:
        return step.prepared is None or not _prepared(batch) or alike(_prepared(batch), step.prepared)

    def run(batch: list[_Step]) -> tuple[list[_Step], list[Detections]]:
        pictures = _prepared(batch)
        return batch, search(pictures) if pictures else []

    names, colors = search.asked.names, search.asked.colors
    waiting: list[_Step] = []
    ahead = max(_FRAMES_AHEAD, size * search.lanes)
    batches = in_batches(prepare, _steps(source, tracker), size, ahead=ahead, alike=can_join)
    with closing(search.in_lanes(run, batches, _prepared)) as done:
        for batch, detections in done:
            results = iter(detections)
            for step in batch:
                if isinstance(tracker, MaskTracker):
                    if step.prepared is None:
                        nothing = Detections.none(names, step.frame.image.size, colors=colors)
                        yield _frame(step, tracker.between(nothing, step.time, step.frame.image))
                    else:
                        yield _frame(step, tracker.update(next(results), step.time, step.frame.image))
                    continue
                if step.prepared is None:
                    waiting.append(step)
                    continue
                earlier = tracker.latest
                found = tracker.update(next(results), step.time, step.frame.image)
                if segmenter is not None:
                    found = segmenter([step.frame.image], [found])[0]
                tracker.frames = step.place + 1
                tracker.latest = later = moment(found, step.time)
                for each in waiting:
                    area = each.frame.image.size
                    yield _frame(each, between(earlier, later, each.time, names, area, colors))
                waiting.clear()
                yield _frame(step, found)
    for each in waiting:
        assert isinstance(tracker, Tracker)
        area = each.frame.image.size
        found = between(tracker.latest, None, each.time, names, area, colors, before=tracker.before)
        tracker.frames, tracker.seconds = each.place + 1, each.time
        yield _frame(each, found)
    if source.remark is not None:
        warnings.warn(source.remark, VideoWarning, stacklevel=2)


def _frame(step: _Step, found: Detections) -> TrackedFrame:
    return TrackedFrame(
        step.frame.number, step.frame.seconds, step.frame.image, found, detected=step.prepared is not None
    )


def _steps(source: FrameSource, tracker: Tracker | MaskTracker) -> Iterator[_Step]:
    """Yield the frames with their places and times in all that a tracker sees, which may be several sources."""
    first, seen, offset = tracker.frames, tracker.seconds, 0.0
    for count, frame in enumerate(source):
        if count == 0 and seen is not None and frame.seconds <= seen:
            offset = seen + 1 / source.rate - frame.seconds
        yield _Step(first + count, frame.seconds + offset, frame, None)


def _prepared(batch: list[_Step]) -> list[PreparedPicture]:
    return [step.prepared for step in batch if step.prepared is not None]
