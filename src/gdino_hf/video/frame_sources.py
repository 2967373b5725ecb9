"""Anything that has frames: video files, folders and lists of pictures, cameras and addresses of streams."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, Protocol

from ..data.folder_files import sort_files
from ..error_text import reason
from ..model.picture_pixels import load_image
from ..model.printable import printable
from ..model.tensor_values import is_picture
from .decoding import FALLBACK_RATE, VideoError, VideoFile, VideoFrame
from .live_streams import LiveStream, is_live_address, webcam


class FrameSource(Protocol):
    """What `open_source` returns: an iterable of frames.

    Attributes:
        name: Name for messages.
        rate: Frames per second, on average.
        expected: Number of frames to expect; None if that is unknown.
        is_live: Whether frames come as they happen, so that late ones are dropped.
        remark: One sentence on what was missing or damaged, once frames were read; None if nothing was.
    """

    name: str
    rate: float
    expected: int | None
    is_live: bool
    remark: str | None

    def __iter__(self) -> Iterator[VideoFrame]: ...


class PictureSequence:
    """Pictures as the frames of a video, at a constant rate.

    A picture that cannot be read is left out; `remark` counts these and gives the reason for the first.

    Args:
        pictures: Pictures in any form that `Detector` takes; a generator is read as it is needed.
        name: Name for messages.
        rate: Frames per second.
        start: Time in seconds of the first frame to yield.
        end: Time in seconds before which frames are yielded; None for all.
    """

    is_live = False

    def __init__(
        self,
        pictures: Iterable[Any],
        name: str = "the pictures",
        rate: float = FALLBACK_RATE,
        start: float = 0.0,
        end: float | None = None,
    ) -> None:
        self._pictures, self.name, self.rate, self._start, self._end = pictures, name, rate, start, end
        self.remark: str | None = None
        self.expected = len(pictures) if isinstance(pictures, Sized) and start == 0 and end is None else None

    def __iter__(self) -> Iterator[VideoFrame]:
        """Yield the frames.

        Raises:
            VideoError: No picture can be read.
        """
        read, fault = 0, ""
        for number, picture in enumerate(self._pictures):
            seconds = number / self.rate
            if self._end is not None and seconds >= self._end:
                break
            if seconds < self._start:
                continue
            # Decoders raise exceptions of any type on damaged files, and one bad frame must not end a video.
            try:
                image = load_image(picture)
            except Exception as error:
                fault = fault or reason(error, name_file=True)
                self.remark = f"{self.name}: pictures that cannot be read were left out, the first because {fault}."
                continue
            read += 1
            yield VideoFrame(number, seconds, image)
        if not read and fault:
            raise VideoError(f"{self.name}: no picture can be read, the first because {fault}; give other pictures.")


def open_source(
    source: Any, *, rate: float | None = None, start: float = 0.0, end: float | None = None, patience: float = 60.0
) -> FrameSource:
    """Open anything that has frames.

    Args:
        source: Path of a video or of a folder of pictures, which are sorted by the numbers in their names; "webcam" or
            "webcam:1"; address of a stream (rtsp, rtmp, udp, tcp, srt, http, https) or of a video file; or an iterable
            of pictures in any form that `Detector` takes. A source that was opened is returned as it is.
        rate: Frames per second of pictures, 25 by default; a video and a stream tell their own.
        start: Time in seconds of the first frame to yield; not for streams.
        end: Time in seconds before which frames are yielded; None for all.
        patience: Seconds after which a stream that does not come back is given up.

    Returns:
        The frames, as an iterable with the attributes of `FrameSource`.

    Raises:
        TypeError: The source has another type.
        ValueError: The source cannot be read, or a number is out of its range.
    """
    check_span(start, end)
    if rate is not None and not 0 < rate <= 1000:
        raise ValueError(f"rate is {rate}; give frames per second, above 0 and up to 1000.")
    per_second = rate or FALLBACK_RATE
    if isinstance(source, (VideoFile, PictureSequence, LiveStream)):
        return source
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        if isinstance(text, str) and (is_live_address(text) or re.fullmatch(r"webcam(:\d+)?", text)):
            if start:
                raise ValueError(f"start is {start:g}, but a stream begins when it is opened; leave it out.")
            if rate is not None:
                raise ValueError(f"rate is {rate:g}, but a stream tells its own; leave it out.")
            address = webcam(int(text.partition(":")[2] or 0)) if text.startswith("webcam") else (text, None)
            return LiveStream(*address, end=end, patience=patience)
        path = Path(text)
        if path.is_dir():
            return _folder(path, per_second, start, end)
        if rate is not None:
            raise ValueError(f"rate is {rate:g}, but a video tells its own; leave it out.")
        return VideoFile(path, start=start, end=end)
    if is_picture(source) or not isinstance(source, Iterable):
        raise TypeError(
            f"A source of frames is a path, an address, 'webcam' or an iterable of pictures, got "
            f"{type(source).__name__}; for one picture call the detector."
        )
    return PictureSequence(source, rate=per_second, start=start, end=end)


def check_span(start: float, end: float | None) -> None:
    """Check times of a part of a video.

    Raises:
        ValueError: They are no part of a video.
    """
    if not 0 <= start < float("inf"):
        raise ValueError(f"start is {start}; give seconds from the start of the video, 0 or more.")
    if end is not None and not start < end < float("inf"):
        raise ValueError(f"end is {end}; give seconds above start, which is {start:g}.")


def _folder(folder: Path, rate: float, start: float, end: float | None) -> PictureSequence:
    name = printable(str(folder))
    pictures = [file for file, _ in sort_files(folder, None).pictures]
    if not pictures:
        raise VideoError(f"{name} is a folder without pictures; give a video or a folder with its frames.")
    return PictureSequence(sorted(pictures, key=lambda file: _by_numbers(str(file))), name, rate, start, end)


def _by_numbers(text: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts frame2 before frame10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]
