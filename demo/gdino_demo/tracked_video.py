"""Objects followed through an uploaded video, with the code of `gdino track`, for a limited time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gdino_hf.video import track_files
from gdino_hf.video.track_run import Stop, TrackRun
from gdino_hf.video.tracked_frames import TrackedFrame, make_tracker, track

from .engine import Models
from .masks import OFF
from .outputs import Settings
from .queries import Query
from .safety import Refused
from .video import LONGEST_VIDEO, UploadedVideo

LONGEST_WORK = 120.0
"""Seconds for which a model searches one video at most, since other visitors wait meanwhile."""
ANNOTATED, SUMMARY = "annotated.mp4", "summary.json"
FILES = (track_files.FRAMES, track_files.TABLE, track_files.MOT, track_files.COCO, SUMMARY)
"""Names of the files that a run leaves in its folder beside the annotated video."""

# Seconds after which an object that is not found is given up, as for `gdino track`.
_PATIENCE = 1.0

Progress = Callable[[int, int | None], None]
"""Is told the number of frames so far, and how many to expect; None if that is unknown."""


@dataclass(frozen=True)
class Tracked:
    """What a run found.

    Attributes:
        summary: Content of `SUMMARY`: settings, "frames", "tracks" and more.
        size: (width, height) of the frames that were searched, in pixels.
        remarks: One sentence each on what was cut off, missing or odd.
    """

    summary: dict[str, Any]
    size: tuple[int, int]
    remarks: tuple[str, ...]


def track_video(
    models: Models,
    name: str,
    path: str,
    query: Query,
    settings: Settings,
    every: int,
    folder: Path,
    *,
    masks: str = OFF,
    draw: bool = True,
    progress: Progress | None = None,
) -> Tracked:
    """Follow what labels name through a video, and write the files of it.

    Args:
        models: The models of the page.
        name: Name of the model.
        path: Path of the uploaded video.
        query: The labels.
        settings: The thresholds.
        every: Number of frames from one detection to the next.
        folder: Folder to write in, which exists.
        masks: Name of the segmenter that makes masks in the frames that the model looks at, or `OFF`.
        draw: Whether to write `ANNOTATED`, too.
        progress: Is told how far the run is.

    Returns:
        What was found.

    Raises:
        Refused: The model or the labels cannot be used, the file is no video that can be read here, or the masks of a
            frame would take too much memory.
    """
    assert query.vocabulary is not None
    remarks = models.check(name, query)
    models.check_masks(masks)
    source = UploadedVideo(path)
    nms = settings.nms if settings.nms < 1 else None
    try:
        tracker = make_tracker(
            "bytetrack", query.vocabulary, source, every=every, threshold=settings.threshold, patience=_PATIENCE
        )
        frames = track(models.searcher(name), source, query.vocabulary, tracker=tracker, every=every, nms_threshold=nms)
        run = TrackRun(folder, source, query.vocabulary.labels, video=folder / ANNOTATED if draw else None)
        masked = _with_masks(frames, models, masks)
        limited = _Limited(masked, source, Stop(), progress)
        finished = run.write(iter(limited), limited.stop)
    except (ImportError, ValueError) as error:
        raise Refused(str(error)) from error
    remarks = (*limited.remarks(finished), *(() if source.remark is None else (source.remark,)), *remarks)
    about = {"model": name, "every": every, "threshold": settings.threshold, "nms": nms, "tracker": tracker.name}
    about |= {} if masks == OFF else {"masks": masks}
    run.summarize(folder / SUMMARY, about | {"remarks": remarks}, finished)
    return Tracked(json.loads((folder / SUMMARY).read_text(encoding="utf-8")), limited.size, remarks)


def found_in_frames(folder: Path) -> list[dict[str, Any]]:
    """Return what a run wrote about each frame: "frame", "seconds", "detected" and "detections" with "track_id"."""
    with open(folder / track_files.FRAMES, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _with_masks(
    frames: Generator[TrackedFrame, None, None], models: Models, name: str
) -> Generator[TrackedFrame, None, None]:
    """Add the masks of tracked objects to the frames that the model looked at."""
    with closing(frames):
        for frame in frames:
            if name == OFF or not frame.detected or not len(frame.found):
                yield frame
                continue
            masks = models.picture_masks(name, frame.image)
            assert masks is not None
            yield replace(frame, found=masks.add(frame.found))


class _Limited:
    """Frames on their way to the files, until the time is over.

    Args:
        frames: The frames.
        source: Where they come from.
        stop: Is asked to end the run when the time is over.
        progress: Is told how far the run is.
    """

    def __init__(
        self, frames: Generator[TrackedFrame, None, None], source: UploadedVideo, stop: Stop, progress: Progress | None
    ) -> None:
        self._frames, self._source, self.stop, self._progress = frames, source, stop, progress
        self._end = time.monotonic() + LONGEST_WORK
        self._seconds, self.size = 0.0, (0, 0)

    def __iter__(self) -> Iterator[TrackedFrame]:
        with closing(self._frames):
            for count, frame in enumerate(self._frames, start=1):
                self._seconds, self.size = frame.seconds, frame.image.size
                if self._progress is not None:
                    self._progress(count, self._source.expected)
                # Before the frame is handed out: a run that gets no further frame would take this for the end.
                self.stop.is_asked = time.monotonic() > self._end
                yield frame

    def remarks(self, finished: bool) -> tuple[str, ...]:
        """Say what was cut off and what was made smaller, one sentence each."""
        said = []
        length = self._source.seconds
        whole = "" if length is None else f" of {_clock(length)}"
        if not finished:
            said.append(
                f"The first {_clock(self._seconds)}{whole} were searched, because one request takes "
                f"{LONGEST_WORK:g} seconds of work; choose a larger stride or a shorter video for the rest."
            )
        elif length is not None and length > LONGEST_VIDEO:
            said.append(
                f"The first {_clock(LONGEST_VIDEO)}{whole} were searched, the longest that a request takes; give the "
                "rest as a video of its own."
            )
        if max(self._source.size) > max(self.size) > 0:
            width, height = self.size
            said.append(
                f"The frames were made smaller, to {width}x{height} pixels; the boxes in all files are in these pixels."
            )
        return tuple(said)


def _clock(seconds: float) -> str:
    """Return a time as minutes and seconds, such as 1:05."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02}"
