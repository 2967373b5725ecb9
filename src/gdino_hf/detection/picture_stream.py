"""Streams of pictures: read ahead in threads, detected in batches, and yielded in order, readable or not."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol

from PIL import Image

from ..error_text import reason
from ..model.picture_limits import PictureError
from ..model.picture_pixels import load_image
from ..model.remote_pictures import downloaded
from ..model.tensor_values import is_picture
from .detections import Detections
from .prepared_pictures import PreparedPicture
from .stages import in_batches


class AnySearch(Protocol):
    """What to look for, checked once: `gdino_hf.detection.search.Search`, and that of `gdino_hf.runtime`."""

    @property
    def lanes(self) -> int:
        """Number of batches that are computed side by side."""
        ...

    def in_lanes(self, function: Any, batches: Any, pictures: Any) -> Generator[Any, None, None]:
        """Call a function that calls this search, with one batch after the other."""
        ...

    def prepare(self, image: Image.Image, source: Any = None) -> PreparedPicture:
        """Make the model's inputs of one picture, in any thread."""
        ...

    def __call__(self, pictures: Sequence[PreparedPicture]) -> list[Detections]:
        """Detect in a batch of pictures."""
        ...


class DetectionError(ValueError):
    """A picture that nothing could be detected in; `stream` yields it in place of the picture's detections.

    Args:
        source: The input as it was given.
        why: What went wrong and what to do about it.
    """

    def __init__(self, source: Any, why: str) -> None:
        super().__init__(why)
        self.source = source


_Attempt = tuple[Any, PreparedPicture | DetectionError]


def read_picture(source: Any) -> Image.Image:
    """Return a picture, upright and RGB, in any form that a `Detector` takes."""
    return load_image(downloaded(source))


def in_one_call(images: Any, search: AnySearch, batch_size: int) -> Any:
    """Detect in one picture or several, those of like shape together.

    Args:
        images: One picture in any form that a detector takes, or a list of them.
        search: What to look for.
        batch_size: Number of pictures in one forward pass.

    Returns:
        `Detections` for one picture; a list of them for a list, in its order.
    """
    single = is_picture(images)
    sources = [images] if single else list(images)
    pictures = [read_picture(source) for source in sources]
    found: list[Detections | None] = [None] * len(pictures)
    order = sorted(range(len(pictures)), key=lambda place: pictures[place].width / pictures[place].height)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = [search.prepare(pictures[place], sources[place]) for place in places]
        for place, result in zip(places, search(batch), strict=True):
            found[place] = result
    return found[0] if single else found


def detect_stream(
    images: Iterable[Any],
    search: AnySearch,
    size: int,
    alike: Callable[[Sequence[PreparedPicture], PreparedPicture], bool],
    readers: int,
    ahead: int,
) -> Iterator[tuple[Any, Detections | DetectionError]]:
    """Detect objects in pictures as `Detector.stream` does.

    Args:
        images: Pictures in any form that a `Detector` takes.
        search: What to look for.
        size: Largest number of pictures in a batch.
        alike: Called with the pictures of a batch and a further one; returns whether it may join.
        readers: Number of threads that read pictures.
        ahead: Number of pictures that are read before they are needed, or more if the lanes need more.

    Yields:
        Each input as it was given, with its `Detections`, or with a `DetectionError` that says why there are none.
    """

    def attempt(source: Any) -> _Attempt:
        # A picture that cannot be read is a value, because it must not end a stream. Decoders raise exceptions of any
        # type on damaged files.
        try:
            return source, search.prepare(read_picture(source), source)
        except Exception as error:
            return source, _error(source, error)

    def can_join(batch: list[_Attempt], attempt: _Attempt) -> bool:
        return isinstance(attempt[1], DetectionError) or alike(_readable(batch), attempt[1])

    def run(batch: list[_Attempt]) -> list[tuple[Any, Detections | DetectionError]]:
        return list(_run_safely(search, batch))

    # One batch for each lane is read while they compute.
    ahead = max(ahead, size * search.lanes)
    batches = in_batches(attempt, images, size, readers, ahead, can_join)
    for found in search.in_lanes(run, batches, _readable):
        yield from found


def _readable(batch: Iterable[_Attempt]) -> list[PreparedPicture]:
    return [picture for _, picture in batch if isinstance(picture, PreparedPicture)]


def _error(source: Any, error: Exception) -> DetectionError:
    why = str(error) if isinstance(error, PictureError) else f"{reason(error, name_file=True, most_lines=3)}."
    found = DetectionError(source, why)
    found.__cause__ = error
    return found


def _run_safely(search: AnySearch, batch: Sequence[_Attempt]) -> Iterator[tuple[Any, Detections | DetectionError]]:
    """Run a batch; if it fails, run its pictures one by one, so that only the culprit has no detections."""
    readable = _readable(batch)
    results: list[Detections | DetectionError]
    try:
        results = [*search(readable)] if readable else []
    except Exception as error:
        if len(readable) == 1:
            results = [_error(readable[0].source, error)]
        else:
            results = [next(_run_safely(search, [(picture.source, picture)]))[1] for picture in readable]
    finished = iter(results)
    for source, picture in batch:
        yield source, next(finished) if isinstance(picture, PreparedPicture) else picture
