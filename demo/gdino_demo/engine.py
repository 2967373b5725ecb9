"""Run the page's models over pictures and their tiles."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from typing import Any

try:
    # On the Hub's ZeroGPU hardware, spaces must be imported before torch.
    from spaces import GPU
except ImportError:

    def GPU(function: Any) -> Any:  # noqa: N802  the name in spaces
        """Stand-in for hardware whose device is always available."""
        return function


import numpy as np
import torch
from PIL import Image

from gdino_hf import Detections, Detector, Vocabulary
from gdino_hf.detection.phrase_grounding import asked_of_caption
from gdino_hf.detection.prepared_images import prepare_image
from gdino_hf.detection.prepared_pictures import PreparedPicture
from gdino_hf.detection.prompt_passes import Asked, Options, ScoredPicture, prompt_outputs
from gdino_hf.detection.tiles import Area, tile_areas
from gdino_hf.inference.workers import only_blocks
from gdino_hf.model.label_faults import label_remarks
from gdino_hf.model.msda_backends import backend_for
from gdino_hf.segmentation import Segmenter
from gdino_hf.segmentation.segmenter import PictureFeatures

from .masks import OFF, PictureMasks, moved
from .outputs import Outputs, Rows
from .queries import Query
from .safety import Picture, Refused

MOST_PASSES = 64
"""Largest number of passes of a model in one request: prompts times the picture and its tiles."""

_BACKENDS = {"c": "C", "triton": "Triton", "hub": "CUDA kernel from the Hub", "torch": "PyTorch"}
_TILES_AT_ONCE = 4


class Models:
    """The models of the page, which run one at a time because each uses every core or the whole GPU.

    Args:
        detectors: Model name -> Detector.
        segmenters: Name -> Segmenter.
    """

    def __init__(self, detectors: Mapping[str, Detector], segmenters: Mapping[str, Segmenter] | None = None) -> None:
        if not detectors:
            raise ValueError("There is no model to show; load at least one.")
        self._detectors, self._segmenters = dict(detectors), dict(segmenters or {})
        self._lock = threading.Lock()
        self._on_device, self._search_on_device = GPU(self._forward), GPU(self._found)
        self._features_on_device, self._masks_on_device = GPU(self._features), GPU(self._masks)
        self.forwards = 0
        """Number of pictures that a model has run on so far; tests check that moving a slider adds none."""

    @property
    def names(self) -> list[str]:
        """Names of the models in the order given; the first is the default."""
        return list(self._detectors)

    @property
    def segmenters(self) -> list[str]:
        """Names of the segmenters."""
        return list(self._segmenters)

    def check(self, name: str, query: Query) -> tuple[str, ...]:
        """Refuse a model name or a query that cannot be used with any picture.

        Args:
            name: One of `names`.
            query: What to look for.

        Returns:
            What is odd about the query's words, one sentence each.

        Raises:
            Refused: There is no such model, or it cannot read a label or the caption.
        """
        return self._asked(name, query)[1]

    def searcher(self, name: str) -> Searcher:
        """Return what `gdino_hf.video` needs of a detector, to run a model of the page.

        Args:
            name: One of `names`.
        """
        return Searcher(self._detectors[name], partial(self._search, name))

    def _search(
        self, name: str, labels: Vocabulary, options: dict[str, Any], pictures: Sequence[PreparedPicture]
    ) -> list[Detections]:
        with self._lock:
            self.forwards += len(pictures)
            found: list[Detections] = self._search_on_device(name, labels, options, pictures)
        return found

    def check_masks(self, name: str) -> None:
        """Refuse what is neither one of `segmenters` nor `OFF`.

        Raises:
            Refused: There is no such segmenter.
        """
        if name not in (OFF, *self._segmenters):
            raise Refused(f"There are no masks of this name here; choose one of {', '.join([OFF, *self._segmenters])}.")

    def picture_masks(self, name: str, image: Image.Image) -> PictureMasks | None:
        """Run a segmenter's image encoder.

        Args:
            name: One of `segmenters`, or `OFF`.
            image: The picture.

        Returns:
            What makes the masks of boxes in it; None for `OFF`.

        Raises:
            Refused: There is no such segmenter.
        """
        self.check_masks(name)
        if name == OFF:
            return None
        with self._lock:
            features = self._features_on_device(name, image)

        def make(features: PictureFeatures, boxes: np.ndarray) -> np.ndarray:
            with self._lock:
                masks: np.ndarray = self._masks_on_device(name, features, boxes)
            return masks

        return PictureMasks(name, features, make, self._segmenters[name].tighten)

    def run(self, name: str, picture: Picture, query: Query, masks: str = OFF) -> Outputs:
        """Run one model on one picture.

        Args:
            name: One of `names`.
            picture: The picture.
            query: What to look for.
            masks: Name of the segmenter that makes masks, or `OFF`.

        Returns:
            The model's outputs, from which thresholds select detections.

        Raises:
            Refused: There is no such model, it cannot read a label or the caption, or the request takes more than
                `MOST_PASSES` passes.
        """
        self.check_masks(masks)
        start = time.perf_counter()
        asked, remarks = self._asked(name, query)
        try:
            tiles = _tiles(picture.image, query.tiles)
            # On ZeroGPU this process has no GPU to pin memory for.
            prepared = prepare_image(self._detectors[name].processor, picture.image, "cpu")
        except (TypeError, ValueError) as error:
            raise Refused(str(error)) from error
        passes = (1 + len(tiles)) * len(asked.chunks)
        if passes > MOST_PASSES:
            raise Refused(
                f"This takes {passes} passes of the model ({len(asked.chunks)} for the labels, in {1 + len(tiles)} "
                f"pictures and tiles); one request takes {MOST_PASSES}, choose larger tiles or fewer labels."
            )
        with self._lock:
            self.forwards += 1
            image = picture.image if tiles else None
            rows, device, backend = self._on_device(name, prepared, image, tiles, asked.chunks)
        return Outputs(
            model=name,
            query=query,
            asked=asked,
            name=picture.name,
            data=picture.data,
            size=picture.image.size,
            tiles=tuple(tiles),
            rows=rows,
            seconds=time.perf_counter() - start,
            device=device,
            backend=_BACKENDS[backend],
            remarks=remarks,
            masks=self.picture_masks(masks, picture.image),
        )

    def _asked(self, name: str, query: Query) -> tuple[Asked, tuple[str, ...]]:
        """Return what to look for in the model's tokens, and what is odd about its words, one sentence each."""
        if name not in self._detectors:
            raise Refused(f"There is no model of this name here; choose one of {', '.join(self._detectors)}.")
        processor = self._detectors[name].processor
        vocabulary = query.vocabulary
        try:
            if vocabulary is None:
                assert query.caption is not None
                asked = asked_of_caption(processor, query.caption, query.phrases, None, Options())
                return asked, asked.remarks
            prompt = vocabulary.prompt(processor.tokenizer, processor.max_text_len)
        except (TypeError, ValueError) as error:
            raise Refused(str(error)) from error
        asked = Asked(
            vocabulary.labels,
            prompt.chunks,
            Options().selection(vocabulary),
            colors=vocabulary.colors,
            details=None if query.caption is None else partial(_spans, query),
        )
        return asked, tuple(label_remarks(prompt, processor.tokenizer))

    def _found(
        self, name: str, labels: Vocabulary, options: dict[str, Any], pictures: Sequence[PreparedPicture]
    ) -> list[Detections]:
        """Return the detections in pictures; on ZeroGPU this runs in a process of its own, as `_forward` does."""
        return self._detectors[name].search(labels, **options)(pictures)

    def _features(self, name: str, image: Image.Image) -> PictureFeatures:
        return moved(self._segmenters[name].features([image])[0], "cpu")

    def _masks(self, name: str, features: PictureFeatures, boxes: np.ndarray) -> np.ndarray:
        segmenter = self._segmenters[name]
        return segmenter.masks(moved(features, segmenter.device), boxes)

    def _forward(
        self, name: str, prepared: Any, image: Image.Image | None, tiles: Sequence[Area], chunks: Sequence[Any]
    ) -> tuple[Rows, str, str]:
        """Return the outputs of the picture and of its tiles on the CPU, and the names of device and backend.

        On ZeroGPU this runs in a process of its own: only there is a GPU, and all results can be pickled.
        """
        detector = self._detectors[name]
        at_once = 1 if detector.device.type == "cpu" else _TILES_AT_ONCE
        rows: list[Any] = []
        with torch.inference_mode(), only_blocks() if detector.optimized else nullcontext():
            rows += _outputs(detector, chunks, [prepared])
            for start in range(0, len(tiles), at_once):
                assert image is not None
                # Only the tiles of one pass are in memory.
                crops = [image.crop(area) for area in tiles[start : start + at_once]]
                rows += _outputs(detector, chunks, [prepare_image(detector.processor, crop, "cpu") for crop in crops])
        return tuple(rows), _device_name(detector.device), _backend(detector.model)


class Searcher:
    """Stands before a detector, so that its forward passes run in turn with those of other requests.

    Args:
        detector: The detector.
        run: Function from a vocabulary, options of `Detector.search` and prepared pictures to their detections.
    """

    def __init__(self, detector: Detector, run: Callable[..., list[Detections]]) -> None:
        self._detector, self._run = detector, run

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self._detector.device

    def search(self, labels: Vocabulary, **options: Any) -> QueuedSearch:
        """Check labels and options, as `Detector.search` does.

        Raises:
            Refused: The labels take more than `MOST_PASSES` passes.
        """
        asked = self._detector.search(labels, **options).asked
        if len(asked.chunks) > MOST_PASSES:
            raise Refused(
                f"This takes {len(asked.chunks)} passes of the model for each frame; one request takes {MOST_PASSES}, "
                "choose fewer labels."
            )
        return QueuedSearch(asked, self._detector.processor, partial(self._run, labels, options))


class QueuedSearch:
    """The part of `gdino_hf.detection.search.Search` that tracking uses.

    Args:
        asked: What to look for.
        processor: The model's processor.
        run: Function from prepared pictures to their detections.
    """

    lanes = 1

    def __init__(
        self, asked: Asked, processor: Any, run: Callable[[Sequence[PreparedPicture]], list[Detections]]
    ) -> None:
        self.asked, self._processor, self._run = asked, processor, run

    def prepare(self, image: Image.Image, source: Any = None) -> PreparedPicture:
        """Make the model's inputs of one picture, in any thread."""
        # On ZeroGPU this process has no GPU to pin memory for.
        return PreparedPicture(image, source, prepare_image(self._processor, image, "cpu"))

    def in_lanes(
        self, function: Callable[[Any], Any], batches: Generator[Any, None, None], pictures: Any
    ) -> Generator[Any, None, None]:
        """Yield a function's results for batches, one after the other, since passes run in turn anyway."""
        with closing(batches):
            yield from map(function, batches)

    def __call__(self, pictures: Sequence[PreparedPicture]) -> list[Detections]:
        """Detect in a batch of pictures."""
        return self._run(pictures)


def _outputs(detector: Detector, chunks: Sequence[Any], prepared: Sequence[Any]) -> list[Any]:
    """Return logits (Q, T) and boxes (Q, 4) on the CPU, of each prompt for each of some pictures."""
    rows: list[Any] = [[] for _ in prepared]
    for place, chunk, logits, boxes in prompt_outputs(detector.model, detector.texts, chunks, prepared):
        # Cloned, because a slice would keep the padding in memory.
        own = logits[:, : len(chunk.input_ids)].float().cpu().clone()
        rows[place].append((own, boxes.float().cpu().clone()))
    return [tuple(of_one) for of_one in rows]


def _spans(query: Query, scored: ScoredPicture) -> dict[str, Any]:
    """Return the caption, and for each detection the characters of its phrase."""
    caption, names = query.caption or "", scored.asked.names
    spans = [tuple(span for span in query.phrases if caption[slice(*span)] == name) for name in names]
    return {"caption": caption, "spans": tuple(spans[label] for label in scored.found["labels"].tolist())}


def _tiles(image: Image.Image, side: int) -> list[Area]:
    """Return the tiles to look at beside the whole picture."""
    areas = tile_areas(image.size, side) if side else []
    return areas if len(areas) > 1 else []


def _backend(model: Any) -> str:
    """Return the name of the implementation of deformable attention that this model's decoder uses."""
    config = model.config
    heads, points = config.decoder_attention_heads, config.decoder_n_points
    value = torch.zeros(1, 1, heads, config.d_model // heads, device=model.device, dtype=model.dtype)
    locations = torch.zeros(1, 1, heads, config.num_feature_levels, points, 2, device=model.device)
    return backend_for(value, locations)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
