"""Cameras and streams: frames as they happen, dropped if the reader is slow, over connections that are made again."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..error_text import reason
from ..model.picture_limits import PictureLimits, check_pixels
from ..model.printable import printable
from .decoding import (
    FALLBACK_RATE,
    FRAMES_OF_ROUNDING,
    SECONDS_OF_RESTART,
    VideoError,
    VideoFrame,
    picture_stream,
    pyav,
    upright,
)

_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "tcp", "srt", "http", "https", "mms")
# Frames that wait for a slow reader; then the oldest is dropped.
_WAITING = 4
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 8.0
# Seconds without an answer after which FFmpeg gives a connection up, when it is made and later.
_TIMEOUT = (10.0, 10.0)


def is_live_address(text: str) -> bool:
    """Whether a text is the address of a stream."""
    return text.partition("://")[0].lower() in _SCHEMES and "://" in text


def webcam(number: int = 0) -> tuple[str, str]:
    """Return what FFmpeg calls a camera of this machine: its name and the device layer that reads it.

    Args:
        number: Index of the camera, from 0.

    Raises:
        VideoError: There is no such camera.
    """
    if sys.platform == "darwin":
        return str(number), "avfoundation"
    if sys.platform == "win32":
        return f"video={number}", "dshow"
    device = Path(f"/dev/video{number}")
    if not device.exists():
        raise VideoError(f"There is no camera {number} ({device} is missing); connect one, or give a video.")
    return str(device), "v4l2"


class LiveStream:
    """The frames of a camera or of a stream. A connection that drops is made again, with growing pauses.

    A thread decodes all the time. If frames are taken more slowly than they come, the oldest waiting ones are dropped,
    so that results do not lag behind; their numbers are missing then. An address of a file that ends, such as
    https://example.org/clip.mp4, is read to its end without dropping anything.

    Args:
        address: Address, or name of a device.
        device: FFmpeg's device layer, such as "v4l2"; None for an address.
        end: Time in seconds at which reading ends; None goes on until the stream ends for good.
        patience: Seconds without a frame after which a stream that dropped is given up.

    Attributes:
        name, rate, expected, remark: As `FrameSource` says.
        reconnections: How often the connection was made again.

    Raises:
        VideoError: The first connection fails, or there are no pictures in the stream.
    """

    def __init__(
        self, address: str, device: str | None = None, *, end: float | None = None, patience: float = 60.0
    ) -> None:
        self.address, self.name, self._device = address, printable(_without_password(address)), device
        self._end, self._patience = end, patience
        self.remark: str | None = None
        self.reconnections = 0
        try:
            self._first: Any = self._connect()
        except (OSError, ValueError) as error:
            if isinstance(error, VideoError):
                raise
            raise VideoError(
                f"{self.name} cannot be opened ({reason(error)}); check the address and whether it is on."
            ) from error
        container, stream = self._first
        self.rate = float(stream.average_rate or stream.guessed_rate or FALLBACK_RATE)
        has_end = device is None and address.lower().startswith("http") and bool(container.duration)
        self.is_live = not has_end
        self.expected = round(container.duration / 1_000_000 * self.rate) if has_end else None

    def __iter__(self) -> Iterator[VideoFrame]:
        """Yield the frames; `remark` says at the end if the stream was given up."""
        waiting = _Newest(_WAITING, drop=self.is_live)
        thread = threading.Thread(target=self._receive, args=(waiting,), name="gdino_hf-stream", daemon=True)
        thread.start()
        try:
            while (frame := waiting.take()) is not None:
                if self._end is not None and frame.seconds >= self._end:
                    return
                yield frame
        finally:
            waiting.leave()

    def _missing(self, number: int, why: str) -> str | None:
        """Say in one sentence that a video, which should have had an end, broke off before it; None if it did not."""
        if self.expected is None or number >= self.expected - FRAMES_OF_ROUNDING:
            return None
        return f"{self.name} broke off ({why}) after {number} of about {self.expected} frames; these were read."

    def _connect(self) -> tuple[Any, Any]:
        options = {"rtsp_transport": "tcp"} if self.address.lower().startswith("rtsp") else {}
        container = pyav().open(
            self.address, format=self._device, options=options, timeout=_TIMEOUT, metadata_errors="ignore"
        )
        try:
            stream = picture_stream(container, self.name)
            check_pixels((stream.codec_context.width, stream.codec_context.height), 1.0, _limits(), self.name)
        except BaseException:
            container.close()
            raise
        return container, stream

    def _receive(self, waiting: _Newest) -> None:
        """Decode frames until the reader leaves or the stream is gone for good; runs in a thread."""
        begin = heard = time.monotonic()
        number, pause, shown = 0, _FIRST_WAIT, 0.0
        try:
            while not waiting.is_left:
                try:
                    connection, self._first = self._first or self._connect(), None
                    # Times go on by the clock after a pause, because streams count from zero again.
                    base = 0.0 if number == 0 else max(time.monotonic() - begin, shown + 1 / self.rate)
                    for seconds, image in _received(*connection):
                        if waiting.is_left:
                            return
                        heard, pause = time.monotonic(), _FIRST_WAIT
                        if number == 0:
                            begin = heard
                        shown = base + seconds
                        waiting.put(VideoFrame(number, shown, image))
                        number += 1
                    why = "the stream ended"
                # Networks, devices and decoders fail in many ways, and each of them may pass.
                except Exception as error:
                    why = reason(error)
                if not self.is_live:
                    self.remark = self._missing(number, why)
                    return
                if time.monotonic() - heard + pause > self._patience:
                    self.remark = (
                        f"{self.name} dropped ({why}) and did not come back within {self._patience:g} seconds; "
                        f"{number} frames were received."
                    )
                    return
                waiting.wait(pause)
                pause = min(2 * pause, _LONGEST_WAIT)
                self.reconnections += 1
        finally:
            waiting.finish()


def _received(container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    """Yield time since the first frame and picture of each frame of a connection, and close it."""
    first: float | None = None
    last = 0.0
    with container:
        for frame in _decoded(container, stream):
            if frame.width * frame.height > _limits().pixels:
                continue
            first = frame.time if first is None else first
            if frame.time is not None and first is not None:
                if frame.time - first < last - SECONDS_OF_RESTART:
                    first = frame.time - last
                last = max(float(frame.time - first), last)
            yield last, upright(frame)


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the frames of a connection, and when it breaks, those that the decoder still holds."""
    invalid = pyav().error.InvalidDataError
    try:
        for packet in container.demux(stream):
            # A lossy network damages frames without ending the stream.
            try:
                frames = packet.decode()
            except invalid:
                continue
            yield from frames
    except OSError:
        with suppress(OSError, ValueError):
            yield from stream.decode(None)
        raise


def _limits() -> PictureLimits:
    return PictureLimits.current()


def _without_password(address: str) -> str:
    """Return an address as it may be printed: user names and passwords left out."""
    scheme, mark, rest = address.partition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}{mark}{place.rpartition('@')[2]}{slash}{path}" if mark else address


class _Newest:
    """A queue between a stream and its reader, of which the oldest item falls out, or which makes its writer wait.

    Args:
        size: Most items that wait.
        drop: Whether the oldest item is dropped when it is full; otherwise putting waits.
    """

    def __init__(self, size: int, drop: bool) -> None:
        self._items: deque[VideoFrame] = deque()
        self._size, self._drop = size, drop
        self._changed = threading.Condition()
        self._is_finished = False
        self.is_left = False

    def put(self, frame: VideoFrame) -> None:
        with self._changed:
            if not self._drop:
                self._changed.wait_for(lambda: self.is_left or len(self._items) < self._size)
            elif len(self._items) == self._size:
                self._items.popleft()
            self._items.append(frame)
            self._changed.notify_all()

    def take(self) -> VideoFrame | None:
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._is_finished)
            frame = self._items.popleft() if self._items else None
            self._changed.notify_all()
            return frame

    def finish(self) -> None:
        with self._changed:
            self._is_finished = True
            self._changed.notify_all()

    def leave(self) -> None:
        with self._changed:
            self.is_left = True
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Wait, but not longer than until the reader leaves."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_left, seconds)
