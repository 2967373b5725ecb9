"""Annotated videos: frames at their times, with the sound of the source, playable whenever writing ends."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from .decoding import VideoFile, one_thread, pyav, refuse_other_files

# In order of preference, depending on the FFmpeg build; every browser plays the first two.
_ENCODERS = ("libx264", "libopenh264", "mpeg4")
_PIXELS = "yuv420p"
_TIME_BASE = Fraction(1, 90_000)
# Sound of these codecs is copied into MP4 as it is; other sound is encoded as AAC.
_COPIED_SOUND = ("aac", "mp3", "ac3", "eac3", "opus", "flac", "alac")
_SOUND_RATE = 48_000


class VideoWriter:
    """Writer of an MP4 file that browsers can play.

    While it is written, the file is fragmented, so that all but the latest second plays even after the process was
    killed. `close` turns it into a plain MP4 file.

    Args:
        path: File to write.
        rate: Frames per second, on average.
        sound: Video whose sound is put beside the frames; None for silence.
        start: Time in seconds that the file begins at, in the time of frames and sound.

    Raises:
        OSError: The file cannot be written.
        ValueError: This build of FFmpeg cannot write videos.
    """

    def __init__(
        self, path: str | os.PathLike[str], rate: float, *, sound: VideoFile | None = None, start: float = 0.0
    ) -> None:
        self.path, self._start = Path(path), start
        self._rate = max(min(Fraction(rate).limit_denominator(1001), Fraction(240)), Fraction(1, 10))
        # delay_moov keeps the time of a first frame that comes later than the sound.
        options = {"movflags": "hybrid_fragmented+delay_moov", "flush_packets": "1"}
        self._container = pyav().open(str(path), "w", format="mp4", options=options)
        self._stream: Any = None
        self._latest = -1
        self._end = 0.0
        self._sound = _Sound(sound, start) if sound is not None and sound.has_sound else None

    def add(self, image: Image.Image, seconds: float) -> None:
        """Append a frame.

        Args:
            image: RGB picture. One of another size than the first is resized to it.
            seconds: Time at which it is shown, later than that of the frame before.

        Raises:
            OSError: The file cannot be written.
        """
        if self._stream is None:
            self._begin(image.size)
        size = (self._stream.width, self._stream.height)
        frame = pyav().VideoFrame.from_image(_fitted(image, size)).reformat(format=_PIXELS, **one_thread())
        self._latest = max(round((seconds - self._start) / _TIME_BASE), self._latest + 1)
        frame.pts, frame.time_base = self._latest, _TIME_BASE
        self._container.mux(self._stream.encode(frame))
        self._end = float(self._latest * _TIME_BASE)
        self._add_sound(self._end)

    def close(self, *, whole: bool = True) -> None:
        """Finish the file; one without any frame is removed.

        Args:
            whole: Whether the frames go on to the end of the source, so that all of its sound belongs to them.

        Raises:
            OSError: The file cannot be written.
        """
        try:
            if self._stream is not None:
                self._container.mux(self._stream.encode())
                self._add_sound(float("inf") if whole else self._end + 1 / float(self._rate))
        finally:
            if self._sound is not None:
                self._sound.close()
            self._container.close()
        if self._stream is None:
            self.path.unlink(missing_ok=True)

    def _begin(self, size: tuple[int, int]) -> None:
        # The preset takes half the time of veryfast, which the model has instead, for a file of twice the size.
        options = {"preset": "ultrafast", "crf": "22", "bf": "0"}
        self._stream = self._container.add_stream(_encoder(), rate=self._rate, options=options)
        # Width and height must be even, since the chroma planes have half the size.
        self._stream.width, self._stream.height = ((side + 1) // 2 * 2 for side in size)
        self._stream.pix_fmt = _PIXELS
        self._stream.codec_context.time_base = _TIME_BASE
        # A fragment ends at each key frame.
        self._stream.gop_size = max(round(self._rate), 1)
        if self._sound is not None:
            self._sound.begin(self._container)

    def _add_sound(self, end: float) -> None:
        if self._sound is not None:
            for packet in self._sound.until(end):
                self._container.mux(packet)


class _Sound:
    """The sound of a video, packet by packet, copied or encoded anew.

    Args:
        source: The video.
        start: Time in seconds that the packets count from.
    """

    def __init__(self, source: VideoFile, start: float) -> None:
        self._file = open(source.path, "rb")  # noqa: SIM115  closed by close
        self.name = source.name
        self._source = pyav().open(
            self._file, format=source.container, metadata_errors="ignore", io_open=refuse_other_files
        )
        # Sound that FFmpeg cannot decode has no context.
        known = [each for each in self._source.streams.audio if each.codec_context is not None]
        self._stream = known[0] if known else None
        self._start = start + (self._source.start_time or 0) / 1_000_000
        self._packets: Iterator[tuple[float, Any]] | None = None
        self._next: tuple[float, Any] | None = None

    def begin(self, output: Any) -> None:
        """Add the stream of sound to a container, before its first packet is written."""
        if self._stream is None:
            warnings.warn(
                f"{self.name} has sound in a codec that is unknown here; the annotated video has none.", stacklevel=2
            )
            return
        codec = self._stream.codec_context
        if codec.name in _COPIED_SOUND and (codec.extradata or codec.name == "mp3"):
            self._packets = self._copied(output.add_stream_from_template(self._stream))
        else:
            layout = "mono" if codec.channels == 1 else "stereo"
            self._packets = self._encoded(output.add_stream("aac", rate=_SOUND_RATE, layout=layout), layout)
        self._next = self._take()

    def until(self, end: float) -> Iterator[Any]:
        """Yield the packets before a time in seconds."""
        while self._next is not None and self._next[0] < end:
            yield self._next[1]
            self._next = self._take()

    def close(self) -> None:
        self._source.close()
        self._file.close()

    def _take(self) -> tuple[float, Any] | None:
        # Damaged sound ends early; the pictures go on.
        try:
            return None if self._packets is None else next(self._packets, None)
        except (OSError, ValueError):
            return None

    def _copied(self, stream: Any) -> Iterator[tuple[float, Any]]:
        for packet in self._source.demux(self._stream):
            if packet.pts is None or packet.dts is None or packet.is_corrupt:
                continue
            seconds = float(packet.pts * packet.time_base) - self._start
            if seconds < 0:
                continue
            shift = round(self._start / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = stream
            yield seconds, packet

    def _encoded(self, stream: Any, layout: str) -> Iterator[tuple[float, Any]]:
        av = pyav()
        resampler = av.AudioResampler(format="fltp", layout=layout, rate=_SOUND_RATE)
        first: int | None = None
        count = 0
        for frame in self._source.decode(self._stream):
            seconds = (frame.time or 0.0) - self._start
            if seconds < 0:
                continue
            first = round(seconds * _SOUND_RATE) if first is None else first
            for samples in resampler.resample(frame):
                samples.pts, samples.time_base = first + count, Fraction(1, _SOUND_RATE)
                count += samples.samples
                for packet in stream.encode(samples):
                    yield float(packet.pts * packet.time_base), packet
        for packet in stream.encode():
            yield float(packet.pts * packet.time_base), packet


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return a picture of this size: with its last row or column repeated if it is odd, or resized."""
    if image.size == size:
        return image
    width, height = image.size
    if (size[0] - width, size[1] - height) not in ((0, 1), (1, 0), (1, 1)):
        return image.resize(size)
    canvas = Image.new("RGB", size)
    # From the farthest corner to the picture itself, which covers all but the added edge.
    for place in ((size[0] - width, size[1] - height), (size[0] - width, 0), (0, size[1] - height), (0, 0)):
        canvas.paste(image, place)
    return canvas


def _encoder() -> str:
    """Return the first encoder that this FFmpeg build has."""
    av = pyav()
    for name in _ENCODERS:
        try:
            av.Codec(name, "w")
        except ValueError:  # the base class of UnknownCodecError
            continue
        return name
    raise ValueError("This build of FFmpeg cannot write videos; pip install av brings one that can.")
