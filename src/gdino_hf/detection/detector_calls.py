"""The calls that a detector has, whatever computes it: one picture, several, or a stream. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from ..model.option_flags import checked_count
from .detections import Detections
from .picture_stream import AnySearch, DetectionError, detect_stream, in_one_call
from .prepared_pictures import PreparedPicture, are_alike
from .tiles import OVERLAP
from .vocabulary import Labels, Vocabulary

SearchT = TypeVar("SearchT", bound=AnySearch)


class DetectorCalls(ABC, Generic[SearchT]):
    """A detector's calls over one method, `_search_for`, that makes a search for a vocabulary."""

    @property
    @abstractmethod
    def labels(self) -> tuple[str, ...] | None:
        """The labels that were baked into an exported model; None if labels are given with a call."""

    @abstractmethod
    def _search_for(self, vocabulary: Vocabulary, options: Mapping[str, Any], **tiling: Any) -> SearchT:
        """Make a search; `tiling` has `tiles`, `overlap` and `batch_size`."""

    def __call__(
        self,
        images: Any,
        labels: Labels | Vocabulary | None = None,
        *,
        negative: Labels = (),
        batch_size: int = 1,
        tiles: int | None = None,
        overlap: float = OVERLAP,
        **options: Any,
    ) -> Any:
        """Detect objects in one picture or several.

        Args:
            images: One picture (path, http(s) address, bytes, PIL image, array, tensor, open file) or a list of them.
            labels: A vocabulary, or labels in any form that `Vocabulary` takes; None for all labels of an exported
                model whose labels are baked in.
            negative: Labels that compete for boxes but are left out; only with labels that are not a vocabulary.
            batch_size: Number of pictures or tiles in one forward pass. Pictures of like shape are put together.
            tiles: Side in pixels of overlapping tiles in which larger pictures are looked at beside the whole; None
                looks at the whole alone.
            overlap: Part of a tile's side that it shares with its neighbour, in [0, 1).
            **options: Fields of `DetectionOptions`: `threshold`, `nms_threshold`, `top_k` and so on.

        Returns:
            `Detections` for one picture, best first; a list of them for a list, in its order.

        Raises:
            TypeError: An input has another type, or there is no such option.
            ValueError: A picture or a label cannot be used.
        """
        search = self.search(labels, negative=negative, tiles=tiles, overlap=overlap, batch_size=batch_size, **options)
        return in_one_call(images, search, batch_size)

    def stream(
        self,
        images: Iterable[Any],
        labels: Labels | Vocabulary | None = None,
        *,
        negative: Labels = (),
        batch_size: int | None = None,
        tiles: int | None = None,
        overlap: float = OVERLAP,
        readers: int = 1,
        ahead: int = 4,
        **options: Any,
    ) -> Iterator[tuple[Any, Detections | DetectionError]]:
        """Detect objects in any number of pictures, in their order and in bounded memory.

        Pictures are read in other threads while the model works. A small optimized model on a CPU runs in several
        threads, too, each with pictures of its own, unless the pictures are large or autocast is on.

        Args:
            images: Pictures in any form that a call takes; a generator is read as it is needed.
            labels: A vocabulary or labels, as in a call.
            negative: Labels that compete for boxes but are left out; only with labels that are not a vocabulary.
            batch_size: Number of pictures or tiles in one forward pass. None takes one, but a model in PyTorch on a CPU
                takes up to four neighbouring pictures that are small and of equal size. A picture waits up to 0.2
                seconds for the next one of its batch; with 1, it does not wait.
            tiles: Side of tiles in pixels, as in a call.
            overlap: Part of a tile's side that it shares with its neighbour, as in a call.
            readers: Number of threads that read pictures.
            ahead: Number of pictures that are read before they are needed.
            **options: Fields of `DetectionOptions`.

        Yields:
            Each input as it was given, with its `Detections`, or with a `DetectionError` that says why there are none.

        Raises:
            TypeError: An option is unknown.
            ValueError: A label cannot be used.
        """
        size, alike = self._own_batches() if batch_size is None else (batch_size, are_alike)
        tiling: Any = {"tiles": tiles, "overlap": overlap, "batch_size": 1 if batch_size is None else batch_size}
        search = self.search(labels, negative=negative, **tiling, **options)
        return detect_stream(images, search, size, alike, readers, ahead)

    def search(
        self,
        labels: Labels | Vocabulary | None = None,
        *,
        negative: Labels = (),
        batch_size: int = 1,
        tiles: int | None = None,
        overlap: float = OVERLAP,
        **options: Any,
    ) -> SearchT:
        """Check labels and options once, for programs with stages of their own; a call and `stream` do this for you.

        Args:
            labels: A vocabulary or labels, as in a call.
            negative: Labels that compete for boxes but are left out; only with labels that are not a vocabulary.
            batch_size: Number of tiles in one forward pass.
            tiles: Side of tiles in pixels, as in a call.
            overlap: Part of a tile's side that it shares with its neighbour, as in a call.
            **options: Fields of `DetectionOptions`.

        Returns:
            A search. Its `prepare` makes a picture ready in any thread; a call runs the model over a batch of these.

        Raises:
            TypeError: A label or an option has another type, or there is no such option.
            ValueError: A label or an option cannot be used.
        """
        if labels is None:
            if self.labels is None:
                raise ValueError("The model takes any labels; say what to look for, as in ['cat', 'cup'].")
            labels = list(self.labels)
        vocabulary = as_vocabulary(labels, {"negative": negative} if len(negative) > 0 else {})
        size = checked_count(batch_size, "batch_size")
        return self._search_for(vocabulary, options, tiles=tiles, overlap=overlap, batch_size=size)

    def _own_batches(self) -> tuple[int, Callable[[Sequence[PreparedPicture], PreparedPicture], bool]]:
        """Return the size of a stream's batches where none is given, and whether a picture may join one."""
        return 1, are_alike


def as_vocabulary(labels: Labels | Vocabulary, options: Mapping[str, Any]) -> Vocabulary:
    """Return labels as a vocabulary.

    Args:
        labels: A vocabulary, or labels in any form that `Vocabulary` takes.
        options: Options of `Vocabulary`.

    Raises:
        TypeError: Options are given beside a vocabulary.
    """
    if not isinstance(labels, Vocabulary):
        return Vocabulary(labels, **options)
    if options:
        raise TypeError(f"{', '.join(options)} cannot be given beside a Vocabulary; make it with them.")
    return labels
