"""Search: what to look for and how, checked once and then run over any number of pictures."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import torch
from PIL import Image

from .detections import Detections
from .lanes import count_lanes, in_lanes
from .prepared_images import prepare_image
from .prepared_pictures import PreparedPicture, are_small
from .prompt_passes import Asked, score_pictures
from .text_features import TextFeatureStore
from .tiles import OVERLAP, tile_areas, with_tiles

Batch = TypeVar("Batch")
Result = TypeVar("Result")

MaskMaker = Callable[[Sequence[Image.Image], Sequence[Detections]], list[Detections]]
"""Returns the detections of pictures with masks: a `gdino_hf.segmentation.Segmenter`."""


class Search:
    """Runs a model over batches of pictures, always for the same labels or the same caption.

    Args:
        model: A `GDinoForObjectDetection`.
        processor: Its processor.
        texts: Store of its text features.
        asked: What to look for.
        tiles: Side in pixels of overlapping tiles in which larger pictures are looked at beside the whole; None looks
            at the whole alone.
        overlap: Part of a tile's side that it shares with its neighbour, in [0, 1).
        batch_size: Largest number of tiles in one forward pass.
        segmenter: Makes the masks of what was found; None makes none.

    Raises:
        ValueError: `tiles` or `overlap` is out of its range.

    Attributes:
        asked: What to look for.
        segmenter: Makes the masks of what was found; None makes none.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        texts: TextFeatureStore,
        asked: Asked,
        *,
        tiles: int | None = None,
        overlap: float = OVERLAP,
        batch_size: int = 1,
        segmenter: MaskMaker | None = None,
    ) -> None:
        if tiles is not None:
            tile_areas((1, 1), tiles, overlap)
        self._model, self._processor, self._texts = model, processor, texts
        self.asked = asked
        self._tiles, self._overlap, self._batch_size = tiles, overlap, batch_size
        self.segmenter = segmenter

    @property
    def lanes(self) -> int:
        """Number of threads that run the model side by side, each on a batch of small pictures; see `count_lanes`."""
        return count_lanes(self._model)

    def in_lanes(
        self,
        function: Callable[[Batch], Result],
        batches: Generator[Batch, None, None],
        pictures: Callable[[Batch], Sequence[PreparedPicture]],
    ) -> Generator[Result, None, None]:
        """Call a function that calls this search, with one batch after the other, in several lanes if that is faster.

        Args:
            function: Called with a batch, possibly in another thread.
            batches: The batches. They are pulled when they are needed, and closed at the end.
            pictures: Returns the pictures of a batch.

        Yields:
            The function's results, in the order of the batches.

        Raises:
            Exception: What the function or the source of the batches raised, after the results of earlier batches.
        """

        def is_small(batch: Batch) -> bool:
            # A model that makes masks is large, whatever the pictures are.
            return self.segmenter is None and are_small(pictures(batch))

        return in_lanes(self._model, function, batches, is_small)

    def prepare(self, image: Image.Image, source: Any = None) -> PreparedPicture:
        """Make the model's inputs of one picture, in any thread.

        Args:
            image: Upright RGB picture.
            source: Where it came from.

        Raises:
            ValueError: The processor refuses the picture.
        """
        return PreparedPicture(image, source, prepare_image(self._processor, image, self._model.device))

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[PreparedPicture]) -> list[Detections]:
        """Detect in a batch of pictures.

        Args:
            pictures: At least one; smaller ones are padded to the largest.

        Returns:
            Detections of each picture, best first.
        """
        found = self._run([picture.inputs for picture in pictures], [picture.source for picture in pictures])
        if self._tiles is not None:
            tiling: Any = {"tiles": self._tiles, "overlap": self._overlap, "batch_size": self._batch_size}
            found = [
                with_tiles(picture.image, whole, self._in_tiles, self.asked.select, **tiling)
                for picture, whole in zip(pictures, found, strict=True)
            ]
        return found if self.segmenter is None else self.segmenter([picture.image for picture in pictures], found)

    def _run(self, inputs: Sequence[Any], sources: Sequence[Any]) -> list[Detections]:
        scored = score_pictures(self._model, self._texts, self.asked, inputs, sources)
        return [picture.detections() for picture in scored]

    def _in_tiles(self, crops: list[Image.Image]) -> list[Detections]:
        inputs = [prepare_image(self._processor, crop, self._model.device) for crop in crops]
        return self._run(inputs, [None] * len(crops))
