"""Frames of video files, upright and with their presentation times, through PyAV."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..error_text import reason
from ..model.option_flags import checked_count
from ..model.picture_limits import PictureLimits, check_pixels
from ..model.printable import printable

FALLBACK_RATE = 25.0
"""Frames per second of a source that does not tell."""

# Demuxers of texts and play lists. Texts are no videos, and what a play list names must not be opened unasked.
_NOT_VIDEOS = ("tty", "concat", "hls", "dash", "srt", "webvtt", "ass", "lrc", "imf")
# A video that ends this many frames early has lost nothing: headers round.
FRAMES_OF_ROUNDING = 2
_SECONDS_OF_ROUNDING = 0.05
# A clock that falls back by more has begun anew, as where recorders put parts of a video into one file.
SECONDS_OF_RESTART = 0.5


class VideoError(ValueError):
    """A video that cannot be read; the message names it, the reason and the remedy in one sentence."""


@dataclass(frozen=True)
class VideoFrame:
    """One frame of a source.

    Attributes:
        number: Index of the frame in its source, from 0.
        seconds: Time at which it is shown, from the start of its source.
        image: Upright RGB picture.
    """

    number: int
    seconds: float
    image: Image.Image


class VideoFile:
    """The frames of a video file, in the order in which they are shown.

    Args:
        path: The file, in any container and codec that FFmpeg decodes.
        start: Time in seconds of the first frame to yield.
        end: Time in seconds before which frames are yielded; None for all.
        every: Distance in frames of the frames to yield; those between are decoded and dropped.
        container: Name of FFmpeg's demuxer, such as "mov", for files from strangers; None recognizes it.
        limits: Limits of a frame's pixels; None for those of the environment variables.

    Attributes:
        name: The file's name, for messages.
        rate: Average number of frames per second.
        container: FFmpeg's demuxer, as given.
        size: (width, height) in pixels as stored; a frame of a rotated video has them swapped.
        seconds: Length that the file states; None if it does not.
        expected: Number of frames to expect between `start` and `end`; None if the file does not tell.
        remark: One sentence on what was missing or damaged, once frames were read; None if nothing was.

    Raises:
        VideoError: The file is missing, is no video, or has no pictures in it.
        PictureError: Its frames have more pixels than `PictureLimits` allows.
    """

    is_live = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        start: float = 0.0,
        end: float | None = None,
        every: int = 1,
        container: str | None = None,
        limits: PictureLimits | None = None,
    ) -> None:
        self._every, self._limits = checked_count(every, "every"), limits or PictureLimits.current()
        self.path, self.name = Path(path), printable(os.fspath(path))
        self.start, self.end, self.container = start, end, container
        self.remark: str | None = None
        self.size = (0, 0)
        with self._open() as (opened, stream):
            self.rate = float(stream.average_rate or stream.guessed_rate or FALLBACK_RATE)
            self.size = stream.codec_context.width, stream.codec_context.height
            self.seconds = _length(opened, stream)
            self._stated_frames = int(stream.frames)
            self.has_sound = bool(opened.streams.audio)
        check_pixels(self.size, 1.0, self._limits, self.name)
        self.expected = self._expected()

    def __iter__(self) -> Iterator[VideoFrame]:
        """Yield the frames. Damaged ones are left out, and after the last, `remark` says so.

        Raises:
            VideoError: No frame can be decoded, or all are before `start`.
        """
        self.remark = None
        count, damaged, last, shown, why = 0, 0, 0.0, 0.0, None
        # Frames that an edit list hides, which the file counts all the same.
        hidden = _Counter()
        with self._open() as (container, stream):
            offset = (container.start_time or 0) / 1_000_000
            decoded = _decode(container, stream, hidden)
            while True:
                try:
                    frame = next(decoded, None)
                # FFmpeg's errors, and those of a disk that goes away, are of many types.
                except (OSError, ValueError) as error:
                    why = reason(error)
                    break
                if frame is None:
                    break
                # A damaged header may also promise a size that would fill the memory.
                if isinstance(frame, Exception) or frame.width * frame.height > self._limits.pixels:
                    damaged += 1
                    continue
                step = 1 / self.rate if count else 0.0
                seconds = last + step if frame.time is None else float(frame.time) - offset
                if seconds < last - SECONDS_OF_RESTART:
                    offset += seconds - last - step
                    seconds = last + step
                seconds = max(seconds, last)
                number, count, last = count, count + 1, seconds
                # The last frame of a slide show is shown for long.
                shown = float((frame.duration or 0) * frame.time_base) if frame.time_base else 0.0
                if self.end is not None and seconds >= self.end:
                    self.remark = self._damage(damaged, number)
                    return
                if seconds >= self.start and number % self._every == 0:
                    yield VideoFrame(number, seconds, upright(frame))
        if not count:
            cause = f" ({why})" if why else ""
            raise VideoError(
                f"{self.name}: no frame of this video can be decoded{cause}; it is damaged, or its codec is unknown "
                "here: save it as MP4 with H.264."
            )
        end = last + max(shown, 1 / self.rate)
        self.remark = self._missing(count, damaged, hidden.count, end, why)
        if last < self.start:
            raise VideoError(f"{self.name} ends after {end:.1f} seconds; give a start before, not {self.start:g}.")

    def _missing(self, count: int, damaged: int, hidden: int, end: float, why: str | None) -> str | None:
        """Say in one sentence what the file has lost; None if it seems whole."""
        is_short = self._stated_frames > count + damaged + hidden + FRAMES_OF_ROUNDING
        if self.seconds is not None and not self._stated_frames:
            is_short = self.seconds > end + FRAMES_OF_ROUNDING / self.rate + _SECONDS_OF_ROUNDING
        if why is not None or is_short:
            length = "" if self.seconds is None else f" of {self.seconds:.1f}"
            cause = "" if why is None else f" ({why})"
            return (
                f"{self.name} is cut off or damaged after {end:.1f}{length} seconds{cause}; the {count} frames before "
                "were read."
            )
        return self._damage(damaged, count)

    def _damage(self, damaged: int, count: int) -> str | None:
        return f"{self.name}: {damaged} damaged frames were left out; {count} were read." if damaged else None

    def _expected(self) -> int | None:
        whole = self._stated_frames or (round(self.seconds * self.rate) if self.seconds else 0)
        if not whole:
            return None
        if self.start == 0 and self.end is None:
            return -(-whole // self._every)
        length = whole / self.rate
        return max(round((min(self.end or length, length) - self.start) * self.rate / self._every), 0)

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        av = pyav()
        try:
            file = open(self.path, "rb")  # noqa: SIM115  closed below
        except OSError as error:
            raise VideoError(f"{self.name} cannot be read ({reason(error)}); give a video file.") from error
        with file:
            # FFmpeg gets an open file and may open no other, which a crafted video or a play list could name.
            try:
                container = av.open(file, format=self.container, metadata_errors="ignore", io_open=refuse_other_files)
            except (OSError, ValueError, EOFError) as error:
                raise VideoError(
                    f"{self.name} cannot be opened as a video ({reason(error)}); it is no video, or is damaged or cut "
                    "off: save it as MP4 with H.264."
                ) from error
            with container:
                yield container, picture_stream(container, self.name)


def pyav() -> Any:
    """Import PyAV.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError('videos need PyAV; pip install "gdino-hf[video]"') from error
    return av


@lru_cache(maxsize=1)
def one_thread() -> dict[str, int]:
    """Return the option of PyAV's conversions of colours that keeps them in the caller's thread.

    Several threads would take processor time from the model, and a frame of usual size does not gain by them. PyAV
    before 17 has neither the threads nor the option.
    """
    return {"threads": 1} if int(pyav().__version__.partition(".")[0]) >= 17 else {}


def picture_stream(container: Any, name: str) -> Any:
    """Return the video stream of an open container, set to decode in several threads.

    Args:
        container: An `av.InputContainer`.
        name: Its name, for messages.

    Raises:
        VideoError: It has none, or FFmpeg has no decoder for it; the picture of an album's cover is not one.
    """
    if set(container.format.name.split(",")) & set(_NOT_VIDEOS):
        raise VideoError(f"{name} is a text or a list of files and no video; give the video itself.")
    attached = pyav().stream.Disposition.attached_pic
    stream = next((each for each in container.streams.video if not each.disposition & attached), None)
    if stream is None:
        what = "only sound in it" if container.streams.audio else "no video stream in it"
        raise VideoError(f"{name} has {what} and no pictures; give a video.")
    if stream.codec_context is None:
        raise VideoError(f"{name} has pictures in a codec that is unknown here; save it as MP4 with H.264.")
    stream.thread_type = "AUTO"
    return stream


def upright(frame: Any) -> Image.Image:
    """Return a frame as a picture, turned and mirrored as the video's display matrix says.

    Phones store portrait videos lying, with such a matrix, which players apply and decoders do not.

    Args:
        frame: An `av.VideoFrame`.

    Returns:
        The RGB picture. A matrix that turns by another angle than 90, 180 or 270 degrees is ignored.
    """
    # PyAV's own to_image copies the pixels row by row, which takes three times as long.
    image = Image.fromarray(frame.to_ndarray(format="rgb24", **one_thread()))
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return image
    # A picture's x becomes xx * x + yx * y, its y becomes xy * x + yy * y; the rest moves and scales it.
    xx, xy, _, yx, yy, *_ = struct.unpack("=9i", bytes(data))
    if xx == yy == 0 and xy and yx:
        image = image.transpose(Image.Transpose.TRANSPOSE)
        flips = yx < 0, xy < 0
    elif xy == yx == 0 and xx and yy:
        flips = xx < 0, yy < 0
    else:
        return image
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flips[0] else image
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if flips[1] else image


@dataclass
class _Counter:
    count: int = 0


def _decode(container: Any, stream: Any, hidden: _Counter) -> Iterator[Any]:
    """Yield the frames, and in place of each packet that cannot be decoded its exception; count those to hide."""
    invalid = pyav().error.InvalidDataError
    for packet in container.demux(stream):
        hidden.count += packet.is_discard
        if packet.is_corrupt:
            yield invalid(0, "the file ends in the middle of a frame")
            continue
        try:
            yield from packet.decode()
        except invalid as error:
            yield error


def _length(container: Any, stream: Any) -> float | None:
    """Return the length of the pictures in seconds, as the file states it."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    stated = stream.metadata.get("DURATION")
    if stated is not None:
        # Matroska keeps the length of each stream in a tag: 00:01:02.500000000.
        try:
            hours, minutes, seconds = (float(part) for part in stated.split(":"))
            return 3600 * hours + 60 * minutes + seconds
        except ValueError:
            return None
    if container.duration is not None and not container.streams.audio:
        return float(container.duration / 1_000_000)
    return None


def refuse_other_files(url: str, flags: int, options: Any) -> Any:
    """Keep FFmpeg from opening what a video names, such as the parts of a play list; for `av.open(io_open=...)`."""
    raise PermissionError(f"it names another file, {url}, which is not opened")
