"""Detector: pictures and labels in, Detections out. The one engine behind the command, the page and bulk work."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from ..model.label_faults import LabelWarning, warn_of_labels
from ..model.option_flags import checked_count, checked_flag
from ..model.text_prompt import Prompt
from .detections import Detections
from .detector_calls import DetectorCalls, as_vocabulary
from .exported_folder import ExportError
from .exported_model import ExportedModel
from .loading import DTYPES, check_int8_place, fitted, load_pair, usable_device
from .phrase_grounding import Chunker, asked_of_caption
from .picture_stream import DetectionError as DetectionError
from .picture_stream import read_picture
from .prepared_pictures import SMALL_PICTURES, PreparedPicture, are_small_and_equal
from .prompt_passes import Asked, Options
from .search import MaskMaker, Search
from .text_features import TextFeatureStore
from .tiles import OVERLAP
from .vocabulary import EncodedTexts, Labels, Vocabulary

logger = logging.getLogger(__name__)


class Detector(DetectorCalls[Search]):
    """A model that finds what labels name.

        detector = Detector("nano")
        found = detector("street.jpg", ["cat", "remote control"])
        for path, found in detector.stream(paths, detector.vocabulary({"cat": ["cat", "kitten"]})): ...

    Image features are computed once for all prompts of a picture, and text features once for all pictures. Several
    threads may share a detector.

    Args:
        model: "nano", Hub id, folder, or a `GDinoForObjectDetection`. A folder may be one that `gdino export` wrote,
            which its own runtime computes on the CPU. A model object is moved to the device and put in
            eval mode.
        processor: The model's processor; None loads it from where the model is.
        device: "auto" (the first GPU, or the CPU), "cpu", "cuda", "cuda:1", ...; None leaves a model object where it
            is.
        dtype: "float32", "bfloat16", "float16", or "int8" for 8-bit products on a CPU; None for that of a model object,
            otherwise "float32".
        optimize: Whether to call `optimize_for_inference` on a CPU; a model object is then changed for good.
        check: Function that is called with the processor before a model's weights are read or downloaded.
        segmenter: A `gdino_hf.segmentation.Segmenter` that makes the masks of everything that is found; None makes
            none. The attribute can be set later, too.

    Raises:
        TypeError: The model or the segmenter has another type.
        ValueError: The model, the device or the dtype cannot be used here.
    """

    def __init__(
        self,
        model: Any = "nano",
        *,
        processor: Any = None,
        device: str | torch.device | None = "auto",
        dtype: str | None = None,
        optimize: bool = True,
        check: Callable[[Any], None] | None = None,
        segmenter: MaskMaker | None = None,
    ) -> None:
        from ..model.modeling_gdino import GDinoForObjectDetection

        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; choose {', '.join(DTYPES)}.")
        if segmenter is not None and not callable(segmenter):
            raise TypeError(f"segmenter is a {type(segmenter).__name__}; make it with gdino_hf.segmentation.Segmenter.")
        self.segmenter = segmenter
        optimize = checked_flag(optimize, "optimize")
        place = None if device is None else usable_device(device)
        if isinstance(model, (str, os.PathLike)):
            if dtype == "int8":
                check_int8_place(place or torch.device("cpu"), optimize)
            self.model, loaded = load_pair(str(model), dtype or "float32", check)
            self.processor = loaded if processor is None else fitted(processor, self.model.config)
        elif isinstance(model, GDinoForObjectDetection):
            self.model = model.eval()
            self.processor = fitted(_processor_of(model) if processor is None else processor, model.config)
            if dtype not in (None, "int8"):
                self.model.to(getattr(torch, str(dtype)))
        else:
            raise TypeError(
                f"Detector takes a Hub id, a folder, 'nano' or a GDinoForObjectDetection, got {type(model).__name__}."
            )
        if place is not None:
            if isinstance(self.model, ExportedModel) and device != "auto" and place.type != "cpu":
                raise ExportError(
                    f"{self.model.name_or_path} is an exported model, which runs on the CPU, not on device {device}; "
                    "leave the device out, or give the model that it was exported from."
                )
            self.model.to(place)
        if dtype == "int8":
            check_int8_place(self.model.device, optimize)
        # float16 is no faster on a CPU, so it is requested for its exact results: do not optimize.
        can_optimize = isinstance(self.model, GDinoForObjectDetection) and self.model.dtype != torch.float16
        self.optimized = optimize and self.model.device.type == "cpu" and can_optimize
        if self.optimized:
            self.model.optimize_for_inference(int8=True if dtype == "int8" else None)
        self.texts = TextFeatureStore(self.model)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The labels that were baked into an exported model; None if labels are given with a call."""
        return self.model.labels if isinstance(self.model, ExportedModel) else None

    @property
    def device(self) -> torch.device:
        """The model's device."""
        device: torch.device = self.model.device
        return device

    def vocabulary(self, labels: Labels | Vocabulary, **options: Any) -> Vocabulary:
        """Make a vocabulary and compute its text features.

        Args:
            labels: Labels in any form that `Vocabulary` takes, or a vocabulary, which is not changed.
            **options: Options of `Vocabulary`.

        Returns:
            A vocabulary that can be saved with its text features and used with any number of pictures.

        Raises:
            TypeError: A label is not a string, or options are given for a vocabulary.
            ValueError: A label cannot be used.
        """
        found = as_vocabulary(labels, options).to(self.device)
        prompts = [chunk.input_ids for chunk in self._prompt(found).chunks]
        features = self.texts.get(prompts, self._given(found))
        own, *narrower = self.texts.fingerprints
        found.encoded = EncodedTexts(own, dict(zip(prompts, features, strict=True)), tuple(narrower))
        return found

    def track(self, source: Any, labels: Labels | Vocabulary, **options: Any) -> Iterator[Any]:
        """Follow objects through a video: yields frames whose `Detections` have `track_ids`.

        See `gdino_hf.video.tracked_frames.track`, which has the same arguments and exceptions.
        """
        from ..video.tracked_frames import track

        return track(self, source, labels, **options)

    def _search_for(self, vocabulary: Vocabulary, options: Mapping[str, Any], **tiling: Any) -> Search:
        asked = Asked(
            vocabulary.labels,
            self._prompt(vocabulary).chunks,
            self._options(options).selection(vocabulary),
            given=self._given(vocabulary),
            colors=vocabulary.colors,
        )
        return self._search(asked, **tiling)

    def _options(self, given: Mapping[str, Any]) -> Options:
        return Options.of(given).with_nms(getattr(self.processor, "nms_threshold", None))

    def _own_batches(self) -> tuple[int, Callable[[Sequence[PreparedPicture], PreparedPicture], bool]]:
        return (SMALL_PICTURES, are_small_and_equal) if self.device.type == "cpu" else super()._own_batches()

    def caption_search(
        self,
        caption: str,
        *,
        spans: Sequence[Any] | None = None,
        chunker: Chunker | None = None,
        batch_size: int = 1,
        tiles: int | None = None,
        overlap: float = OVERLAP,
        **options: Any,
    ) -> Search:
        """Check a caption once, to ground it in any number of pictures.

        Args:
            caption: A text such as "a man riding a horse on the beach".
            spans: (start, end) characters of each phrase, or a list of such pairs for a phrase in several parts; None
                finds the noun phrases.
            chunker: Function from the caption to the (start, end) characters of its noun phrases; None for
                `gdino_hf.detection.phrase_grounding.noun_phrases`.
            batch_size: Number of tiles in one forward pass.
            tiles: Side of tiles in pixels, as in a call.
            overlap: Part of a tile's side that it shares with its neighbour, as in a call.
            **options: Fields of `Options`.

        Returns:
            A search, as `search` returns it.

        Raises:
            TypeError: There is no option of a given name.
            ValueError: The caption or an option cannot be used, or a span is not of the caption.
        """
        if self.labels is not None:
            raise ValueError(
                f"The labels of {self.model.name_or_path} are baked in, and a caption has others; export the model "
                "without --labels."
            )
        asked = asked_of_caption(self.processor, caption, spans, chunker, self._options(options))
        for remark in asked.remarks:
            warnings.warn(remark, LabelWarning, stacklevel=2)
        return self._search(asked, tiles=tiles, overlap=overlap, batch_size=checked_count(batch_size, "batch_size"))

    def ground(self, image: Any, caption: str, **options: Any) -> Detections:
        """Find the boxes of each phrase of a caption. The whole caption is the prompt, as in phrase grounding.

        Args:
            image: One picture in any form that a call takes.
            caption: A text such as "a man riding a horse on the beach".
            **options: Options of `caption_search`.

        Returns:
            `Detections` whose `names` are the phrases, with `spans`, `token_scores` and `caption`, best first. A box
            may have several phrases.

        Raises:
            TypeError: There is no option of a given name.
            ValueError: The picture or the caption cannot be used, or a span is not of the caption.
        """
        search = self.caption_search(caption, **options)
        return search([search.prepare(read_picture(image), image)])[0]

    def refer(self, image: Any, expression: str, score: Literal["max", "mean"] = "max") -> Detections:
        """Find the one box that an expression such as "the cup left of the lamp" refers to.

        Args:
            image: One picture in any form that a call takes.
            expression: The text, all of which is one phrase.
            score: How the box's score follows from those of the tokens: "max", as published for referring expressions,
                or "mean".

        Returns:
            `Detections` with one box, however low its score is.

        Raises:
            ValueError: The picture or the expression cannot be used.
        """
        return self.ground(image, expression, spans=[(0, len(expression))], threshold=0.0, top_k=1, score=score)

    def _search(self, asked: Asked, **options: Any) -> Search:
        return Search(self.model, self.processor, self.texts, asked, segmenter=self.segmenter, **options)

    def _prompt(self, vocabulary: Vocabulary) -> Prompt:
        prompt = vocabulary.prompt(self.processor.tokenizer, self.processor.max_text_len)
        if isinstance(self.model, ExportedModel):
            self.model.check_prompt(prompt)
        warn_of_labels(prompt, self.processor.tokenizer, stacklevel=5)
        return prompt

    def _given(self, vocabulary: Vocabulary) -> Mapping[tuple[int, ...], torch.Tensor]:
        """Return the text features that a vocabulary brings, or raise if another model computed them."""
        encoded = vocabulary.encoded
        if encoded is None:
            return {}
        own, *narrower = self.texts.fingerprints
        if own not in (encoded.fingerprint, *encoded.narrower) and encoded.fingerprint not in narrower:
            raise ValueError(
                "The vocabulary's text features were computed by another model; make it again with "
                "detector.vocabulary(...), or set its attribute encoded to None to keep all but the features."
            )
        dtype = self.model.base_model.level_embed.dtype
        if encoded.fingerprint != own or any(x.dtype != dtype for x in encoded.features.values()):
            _say_cast_once()
        return encoded.features


@functools.cache
def _say_cast_once() -> None:
    logger.warning(
        "A vocabulary's text features were computed by this model in another dtype, and are cast; scores differ a "
        "little from those of a vocabulary made in this dtype."
    )


def _processor_of(model: Any) -> Any:
    from ..model.processing_gdino import GDinoProcessor

    where = model.name_or_path
    try:
        return GDinoProcessor.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {where or 'in memory'} has no processor beside it; pass processor=.") from error
