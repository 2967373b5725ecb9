"""A whole run of tracking: every frame drawn and written beside the model, stopped between two frames at any time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..detection.stages import in_background
from ..whole_files import write_whole_text
from .counting import Counts, Points
from .decoding import VideoFile
from .frame_sources import FrameSource
from .track_drawing import draw_tracks
from .track_files import TrackFiles
from .tracked_frames import TrackedFrame
from .video_writing import VideoWriter

# Frames that wait to be drawn and written. Each holds a picture in memory, so there are few.
_WAITING = 4


class Stop:
    """A handler of signals that asks a run to end: at once while it waits for a frame, otherwise after the frame."""

    def __init__(self) -> None:
        self.is_asked = False
        self._may_raise = False

    def __call__(self, *signal: Any) -> None:
        self.is_asked = True
        if self._may_raise:
            raise KeyboardInterrupt

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let the signal interrupt what is done inside."""
        self._may_raise = True
        try:
            yield
        finally:
            self._may_raise = False


class TrackRun:
    """Writes the results of one source.

    Args:
        folder: Folder of results, which exists.
        source: The frames.
        names: All labels.
        video: Annotated video to write; None for none.
        lines: Lines to count crossings of; see `Counts`.
        zones: Zones to count objects in.

    Attributes:
        files: The files of tracks.
        counts: Counts of lines and zones; None without any, or before the first frame.

    Raises:
        OSError: A file cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        source: FrameSource,
        names: tuple[str, ...],
        *,
        video: Path | None = None,
        lines: Sequence[Points] = (),
        zones: Sequence[Points] = (),
    ) -> None:
        self._source, self._lines, self._zones = source, lines, zones
        self.files = TrackFiles(folder, Path(source.name).name, names, source.rate)
        self.counts: Counts | None = None
        self._writer: VideoWriter | None = None
        if video is not None:
            file = source if isinstance(source, VideoFile) else None
            self._writer = VideoWriter(video, source.rate, sound=file, start=file.start if file is not None else 0.0)

    def write(self, frames: Iterator[TrackedFrame], stop: Stop, bar: Any = None) -> bool:
        """Write all frames.

        Args:
            frames: What `Detector.track` yields for the source.
            stop: Ends the run if it is asked to.
            bar: Stream for a progress bar, which is shown if it is a terminal; None for none.

        Returns:
            Whether the run came to the end of the source.

        Raises:
            OSError: A file cannot be written.
            ValueError: A line or a zone is outside the frames, or no frame can be decoded.
        """
        import warnings

        from tqdm import tqdm

        from .tracked_frames import VideoWarning

        finished = False
        try:
            # disable=None: no bar if the stream is no terminal
            with (
                tqdm(
                    total=self._source.expected,
                    desc="track",
                    unit="frame",
                    file=bar,
                    disable=True if bar is None else None,
                    leave=False,
                ) as shown,
                in_background(self._record, _WAITING) as record,
                warnings.catch_warnings(),
            ):
                # The source keeps the remark, which is told at the end.
                warnings.simplefilter("ignore", VideoWarning)
                try:
                    while not stop.is_asked:
                        with stop.waiting():
                            frame = next(frames, None)
                        if frame is None:
                            finished = True
                            break
                        record(frame)
                        shown.update()
                except KeyboardInterrupt:
                    stop.is_asked = True
        finally:
            if hasattr(frames, "close"):
                frames.close()
            if self._writer is not None:
                self._writer.close(whole=finished and getattr(self._source, "end", None) is None)
            self.files.finish()
        return finished

    def _record(self, frame: TrackedFrame) -> None:
        """Count, draw and write one frame."""
        if self.counts is None and (self._lines or self._zones):
            self.counts = Counts(self._lines, self._zones, frame.image.size)
        if self.counts is not None:
            self.counts.add(frame.found)
        self.files.add(frame)
        if self._writer is not None:
            self._writer.add(draw_tracks(frame, self.counts), frame.seconds)

    def summarize(self, path: Path, settings: dict[str, Any], finished: bool) -> None:
        """Write a JSON file with the settings, the tracks and the counts.

        Args:
            path: File to write.
            settings: Settings of the run.
            finished: Whether the run came to the end of the source.

        Raises:
            OSError: The file cannot be written.
        """
        tracks = [
            {
                "track_id": row.track_id,
                "label": row.label,
                "first_frame": row.first,
                "last_frame": row.last,
                "first_seconds": round(row.first_seconds, 3),
                "last_seconds": round(row.last_seconds, 3),
                "frames": row.frames,
                "mean_score": round(row.mean_score, 4),
            }
            for row in sorted(self.files.tracks.values(), key=lambda row: row.track_id)
        ]
        content = {
            "source": self._source.name,
            "labels": list(self.files.names),
            **settings,
            "frames_per_second": self._source.rate,
            "frames": self.files.frames,
            "finished": finished,
            "remark": self._source.remark,
            "tracks": tracks,
            "counts": self.counts.summary() if self.counts is not None else None,
        }
        write_whole_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
