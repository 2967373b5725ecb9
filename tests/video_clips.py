"""Small videos with known frames, for tests: flat colours that tell their number, in any codec and container."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

CODEC_ROUNDING = 14
"""Largest error of a flat colour after lossy compression, whose chroma planes have half the size."""


def shade(number: int) -> tuple[int, int, int]:
    """The colour of a frame."""
    return (20 * number % 240, 100, 200)


def number_of(image: Image.Image) -> int:
    """The number below 12 of the frame with this colour."""
    red = np.asarray(image, dtype=float)[..., 0].mean()
    assert abs(red / 20 - round(red / 20)) * 20 < CODEC_ROUNDING
    return round(red / 20)


def flat_frames(count: int, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    """Frames of flat colours."""
    return [Image.new("RGB", size, shade(number)) for number in range(count)]


def write_clip(
    path: Path,
    images: Iterable[Image.Image],
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rate: int = 10,
    times: Sequence[float] | None = None,
    sound: bool = False,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    gop: int = 4,
) -> Path:
    """Write a video.

    Args:
        path: File to write; its ending chooses the container.
        images: The frames.
        codec: FFmpeg's encoder.
        pixels: Pixel format.
        rate: Frames per second.
        times: Time of each frame in seconds; None for a constant rate.
        sound: Whether a tone lies beside the pictures.
        options: Options of the encoder.
        container: Options of the container.
        gop: Frames from one key frame to the next.
    """
    with av.open(str(path), "w", options=container or {}) as output:
        images = list(images)
        stream: Any = output.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = images[0].size
        stream.pix_fmt = pixels
        if codec != "gif":
            # AVI takes the time base for the rate.
            stream.codec_context.time_base = Fraction(1, rate if path.suffix == ".avi" else 1000)
            stream.gop_size = gop
        tone: Any = output.add_stream("aac", rate=16000, layout="mono") if sound else None
        base = stream.codec_context.time_base or Fraction(1, rate)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_image(image)
            frame.pts = round((times[number] if times else number / rate) / base)
            frame.time_base = base
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        if tone is not None:
            for start in range(0, int(16000 * len(images) / rate), 1024):
                wave = 8000 * np.sin(np.arange(start, start + 1024) * 2 * np.pi * 440 / 16000)
                samples = av.AudioFrame.from_ndarray(wave.astype(np.int16)[None], format="s16", layout="mono")
                samples.sample_rate, samples.pts, samples.time_base = 16000, start, Fraction(1, 16000)
                output.mux(tone.encode(samples))
            output.mux(tone.encode())
    return path


def write_sound(path: Path, cover: bool = False) -> Path:
    """Write a file with sound alone, or with the picture of a cover beside it."""
    with av.open(str(path), "w") as output:
        tone: Any = output.add_stream("libmp3lame" if path.suffix == ".mp3" else "aac", rate=16000, layout="mono")
        picture: Any = None
        if cover:
            picture = output.add_stream("mjpeg")
            picture.width = picture.height = 32
            picture.pix_fmt = "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32)))
            frame.pts, frame.time_base = 0, Fraction(1, 25)
            output.mux([*picture.encode(frame), *picture.encode()])
        for start in range(0, 16000, 1024):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.int16), format="s16", layout="mono")
            samples.sample_rate, samples.pts, samples.time_base = 16000, start, Fraction(1, 16000)
            output.mux(tone.encode(samples))
        output.mux(tone.encode())
    return path


def turn(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write the display matrix that phones write into an MP4 file: xx, xy, yx, yy."""
    data = path.read_bytes()
    header = data.index(b"tkhd") + 4
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = data.index(identity, header)
    xx, xy, yx, yy = matrix
    turned = struct.pack(">9i", xx << 16, xy << 16, 0, yx << 16, yy << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data[:place] + turned + data[place + 36 :])
    return path
