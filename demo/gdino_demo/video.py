"""Read frames from uploaded videos with a fixed choice of demuxers, and write annotated frames to an MP4."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from PIL import Image

from gdino_hf.model.picture_limits import PictureError, PictureLimits
from gdino_hf.video.decoding import VideoError, VideoFile

from .safety import LARGEST_REQUEST, MEGABYTE, MOST_PIXELS, Refused

MOST_FRAMES = 300
LONGEST_SIDE = 1280
# Self-contained formats only: playlists and similar formats name other files, which must not be opened.
_CONTAINERS = {"mov": "MP4 or MOV", "matroska": "WebM or MKV", "avi": "AVI"}
# In order of preference, depending on the FFmpeg build; every browser plays the first two.
_ENCODERS = ("libx264", "libopenh264", "mpeg4")
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
        try:
            # A fixed demuxer, so that a crafted video cannot make FFmpeg try others; it opens no other file either way.
            self._file = VideoFile(
                path, every=self.stride, container=_container(path), limits=PictureLimits(pixels=MOST_PIXELS)
            )
        except PictureError as error:
            raise Refused(
                f"The video has frames that are too large; they may have {MOST_PIXELS // 1_000_000} million pixels."
            ) from error
        except VideoError as error:
            why = (
                "There are no pictures in this video; choose another file." if "no pictures" in str(error) else _DAMAGED
            )
            raise Refused(why) from error
        self.rate = Fraction(self._file.rate).limit_denominator(1001)
        self.expected = min(self._file.expected, MOST_FRAMES) if self._file.expected else None
        """Number of frames to expect; None if the file does not say."""
        self.stopped = False
        """Whether the video has more than `MOST_FRAMES` frames to read."""

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames in order; damaged frames are left out.

        Raises:
            Refused: No frame can be decoded.
        """
        try:
            for given, frame in enumerate(self._file):
                if given == MOST_FRAMES:
                    self.stopped = True
                    return
                frame.image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
                yield Frame(frame.number, frame.seconds, frame.image)
        except VideoError as error:
            raise Refused(_DAMAGED) from error


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
