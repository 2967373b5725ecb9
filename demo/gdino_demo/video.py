"""Read frames from uploaded videos with a fixed choice of demuxers, and write annotated frames to an MP4."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from PIL import Image

from .safety import LARGEST_REQUEST, MEGABYTE, MOST_PIXELS, Refused

MOST_FRAMES = 300
LONGEST_SIDE = 1280
# Self-contained formats only: playlists and similar formats name other files, which must not be opened.
_CONTAINERS = {"mov": "MP4 or MOV", "matroska": "WebM or MKV", "avi": "AVI"}
# In order of preference, depending on the FFmpeg build; every browser plays the first two.
_ENCODERS = ("libx264", "libopenh264", "mpeg4")
_FALLBACK_RATE = Fraction(25)
_DAMAGED = "The video is damaged or of a kind that cannot be decoded; save it as MP4 with H.264."


@dataclass(frozen=True)
class Frame:
    """One frame to run the model on.

    Attributes:
        number: Index of the frame in the video, from 0.
        seconds: Time at which it is shown.
        image: RGB picture, at most `LONGEST_SIDE` pixels wide and high.
    """

    number: int
    seconds: float
    image: Image.Image


class Reader:
    """Iterator over every `stride`-th frame of a video, up to `MOST_FRAMES`.

    Args:
        path: Path of an uploaded file.
        stride: Distance between the frames to read; 1 reads every frame.

    Raises:
        Refused: The file is too large, or not a video that can be read here.
    """

    def __init__(self, path: str, stride: int) -> None:
        self.path, self.stride = path, max(int(stride), 1)
        try:
            size = os.path.getsize(path)
            os.utime(path)
        except OSError as error:
            raise Refused("The video is no longer kept here; uploads are removed after a while.") from error
        if size > LARGEST_REQUEST:
            raise Refused(
                f"The video has {size // MEGABYTE} MB; it may have {LARGEST_REQUEST // MEGABYTE} MB, make it shorter."
            )
        self.format = _container(path)
        with self._open() as (container, stream):
            self.rate = Fraction(stream.average_rate or stream.guessed_rate or _FALLBACK_RATE)
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MOST_PIXELS:
                raise Refused(
                    f"The video has {width} x {height} pixels; it may have {MOST_PIXELS // 1_000_000} million."
                )
            frames = stream.frames or int((container.duration or 0) / av.time_base * self.rate)
        self.expected = min(-(-frames // self.stride), MOST_FRAMES) if frames else None
        """Number of frames to expect; None if the file does not say."""
        self.stopped = False
        """Whether the video has more than `MOST_FRAMES` frames to read."""

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames in order; damaged frames are skipped.

        Raises:
            Refused: No frame can be decoded.
        """
        given = 0
        with self._open() as (container, stream):
            try:
                for number, frame in enumerate(_decode(container, stream)):
                    if number % self.stride:
                        continue
                    if given == MOST_FRAMES:
                        self.stopped = True
                        return
                    if frame.width * frame.height > MOST_PIXELS:
                        raise Refused(_DAMAGED)
                    image = upright(frame)
                    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
                    yield Frame(number, float(frame.time or number / self.rate), image)
                    given += 1
            except av.error.FFmpegError as error:
                if not given:
                    raise Refused(_DAMAGED) from error
        if not given:
            raise Refused(_DAMAGED)

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        # FFmpeg gets an open file and a fixed demuxer, so that a crafted video cannot make it open other files.
        with open(self.path, "rb") as file:
            try:
                container = av.open(file, format=self.format, metadata_errors="ignore")
            except (av.error.FFmpegError, ValueError) as error:
                raise Refused(_DAMAGED) from error
            with container:
                if not container.streams.video:
                    raise Refused("There are no pictures in this video; choose another file.")
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                yield container, stream


def upright(frame: Any) -> Image.Image:
    """Return a frame as a picture, turned and mirrored as the video's display matrix says.

    Phones store portrait videos lying, with such a matrix, which players apply and decoders do not.

    Args:
        frame: An `av.VideoFrame`.

    Returns:
        The RGB picture. A matrix that turns by another angle than 90, 180 or 270 degrees is ignored.
    """
    image: Image.Image = frame.to_image()
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


def _decode(container: Any, stream: Any) -> Iterator[Any]:
    """Yield all frames that can be decoded."""
    for packet in container.demux(stream):
        with contextlib.suppress(av.error.InvalidDataError):
            yield from packet.decode()


class Writer:
    """Writer of an MP4 file that browsers can play.

    Args:
        path: File to write.
        rate: Frames per second.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        self.container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        self.rate = max(min(rate.limit_denominator(1000), Fraction(60)), Fraction(1, 4))
        self.stream: Any = None

    def add(self, image: Image.Image) -> None:
        """Append a frame, resized to the size of the first."""
        if self.stream is None:
            self.stream = self.container.add_stream(_encoder(), rate=self.rate)
            # Width and height must be even, since the chroma planes have half the size.
            self.stream.width, self.stream.height = image.width // 2 * 2 or 2, image.height // 2 * 2 or 2
            self.stream.pix_fmt = "yuv420p"
        size = (self.stream.width, self.stream.height)
        frame = av.VideoFrame.from_image(image if image.size == size else image.resize(size))
        self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        """Finish the file; without any frame it is empty."""
        if self.stream is not None:
            self.container.mux(self.stream.encode())
        self.container.close()


def _encoder() -> str:
    """Return the first encoder that this FFmpeg build has."""
    for name in _ENCODERS:
        try:
            av.Codec(name, "w")
        except ValueError:  # the base class of UnknownCodecError
            continue
        return name
    raise Refused("This server cannot write videos; ask its host to install PyAV from PyPI.")


def _container(path: str) -> str:
    """Return the demuxer for a file by its first bytes."""
    with open(path, "rb") as file:
        start = file.read(12)
    if start[4:8] == b"ftyp":
        return "mov"
    if start[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        return "avi"
    raise Refused(f"This is not a video that can be read here; give {', '.join(_CONTAINERS.values())}.")
