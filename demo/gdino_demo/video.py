"""Uploaded videos: a fixed choice of demuxers, frames of bounded size, and limits of size and time."""

from __future__ import annotations

import os
from collections.abc import Iterator

from PIL import Image

from gdino_hf.model.picture_limits import PictureError, PictureLimits
from gdino_hf.video.decoding import VideoError, VideoFile, VideoFrame

from .safety import LARGEST_REQUEST, MEGABYTE, MOST_PIXELS, Refused

LONGEST_VIDEO = 3600.0
"""Seconds of a video that are searched at most."""
LONGEST_SIDE = 1280
"""Pixels to which the longer side of larger frames is made smaller, since frames between detections wait in memory."""
# Self-contained formats only: playlists and similar formats name other files, which must not be opened.
_CONTAINERS = {"mov": "MP4 or MOV", "matroska": "WebM or MKV", "avi": "AVI"}
_DAMAGED = "The video is damaged or of a kind that cannot be decoded; save it as MP4 with H.264."


class UploadedVideo(VideoFile):
    """The frames of an uploaded video up to `LONGEST_VIDEO`, each at most `LONGEST_SIDE` pixels wide and high.

    Args:
        path: Path of the uploaded file.

    Raises:
        Refused: The file is too large, or not a video that can be read here.
    """

    def __init__(self, path: str) -> None:
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
            super().__init__(
                path, end=LONGEST_VIDEO, container=_container(path), limits=PictureLimits(pixels=MOST_PIXELS)
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
        # Results name the file, but not where it lies on the server.
        self.name = os.path.basename(self.name)

    def __iter__(self) -> Iterator[VideoFrame]:
        """Yield the frames in order; damaged ones are left out, and after the last, `remark` says so.

        Raises:
            Refused: No frame can be decoded.
        """
        try:
            for frame in super().__iter__():
                yield VideoFrame(frame.number, frame.seconds, _bounded(frame.image))
        except VideoError as error:
            raise Refused(_DAMAGED) from error


def _bounded(image: Image.Image) -> Image.Image:
    """Return the picture, or a smaller one if it is larger than `LONGEST_SIDE`."""
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return image


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
