"""Detector: pictures and labels in, Detections out. The one engine behind the command, the page and bulk work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image

from ..error_text import reason
from ..model.box_ops import box_scale
from ..model.grounded_results import LabelledRow, ScoredRow, Selection
from ..model.label_faults import warn_of_labels
from ..model.picture_limits import PictureError
from ..model.picture_pixels import load_image
from ..model.pipeline_inputs import is_picture
from ..model.prompt_groups import features_of_rows, rows_at_once
from ..model.remote_pictures import downloaded
from ..model.text_prompt import Prompt
from .detections import Detections
from .loading import DTYPES, fitted, load_pair, usable_device
from .stages import in_batches
from .text_features import TextFeatureStore
from .vocabulary import EncodedTexts, Labels, Vocabulary

THRESHOLD = 0.3
"""Score that detections must exceed by default."""


class DetectionError(ValueError):
    """A picture that nothing could be detected in; `stream` yields it in place of the picture's detections.

    Args:
        source: The input as it was given.
        why: What went wrong and what to do about it.
    """

    def __init__(self, source: Any, why: str) -> None:
        super().__init__(why)
        self.source = source


@dataclass(frozen=True)
class Options:
    """Which boxes become detections.

    Attributes:
        threshold: Score that detections must exceed, 0..1; labels may have thresholds of their own in the vocabulary.
        text_threshold: Lowest score of a label's best token, 0..1.
        nms_threshold: IoU in 0..1 above which the lower-scoring of two boxes of one label is dropped; None keeps both.
        class_agnostic_nms: Whether boxes of different labels also suppress each other.
        top_k: Largest number of detections in a picture; None keeps all.
        multi_label: Whether one box may have several labels, each with its own score.
        score: How a label's score follows from those of its tokens: "max", or "mean" as in COCO evaluations.
    """

    threshold: float = THRESHOLD
    text_threshold: float = 0.0
    nms_threshold: float | None = None
    class_agnostic_nms: bool = False
    top_k: int | None = None
    multi_label: bool = False
    score: Literal["max", "mean"] = "max"

    def selection(self, vocabulary: Vocabulary) -> Selection:
        """Return the rule by which a vocabulary's scores become detections.

        Raises:
            ValueError: A value is out of its range.
        """
        return Selection(
            vocabulary.thresholds(self.threshold),
            self.text_threshold,
            self.score,
            self.multi_label,
            self.nms_threshold,
            self.class_agnostic_nms,
            self.top_k,
            "mean" if vocabulary.combine == "mean" else "max",
        )


class Detector:
    """A model that finds what labels name.

        detector = Detector("nano")
        found = detector("street.jpg", ["cat", "remote control"])
        for path, found in detector.stream(paths, detector.vocabulary({"cat": ["cat", "kitten"]})): ...

    Image features are computed once for all prompts of a picture, and text features once for all pictures. Several
    threads may share a detector.

    Args:
        model: "nano", Hub id, folder, or a `GDinoForObjectDetection`. A model object is moved to the device and put in
            eval mode.
        processor: The model's processor; None loads it from where the model is.
        device: "auto" (the first GPU, or the CPU), "cpu", "cuda", "cuda:1", ...; None leaves a model object where it
            is.
        dtype: "float32", "bfloat16", "float16", or "int8" for 8-bit products on a CPU; None for that of a model object,
            otherwise "float32".
        optimize: Whether to call `optimize_for_inference` on a CPU; a model object is then changed for good.
        check: Function that is called with the processor before a model's weights are read or downloaded.

    Raises:
        TypeError: The model has another type.
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
    ) -> None:
        from ..model.modeling_gdino import GDinoForObjectDetection

        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; choose {', '.join(DTYPES)}.")
        place = None if device is None else usable_device(device)
        if isinstance(model, (str, os.PathLike)):
            if dtype == "int8":
                _check_int8(place or torch.device("cpu"), optimize)
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
            self.model.to(place)
        if dtype == "int8":
            _check_int8(self.model.device, optimize)
        # float16 is no faster on a CPU, so it is requested for its exact results: do not optimize.
        self.optimized = optimize and self.model.device.type == "cpu" and self.model.dtype != torch.float16
        if self.optimized:
            self.model.optimize_for_inference(int8=True if dtype == "int8" else None)
        self.texts = TextFeatureStore(self.model)

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
        found = _as_vocabulary(labels, options).to(self.device)
        prompts = [chunk.input_ids for chunk in self._prompt(found).chunks]
        features = self.texts.get(prompts, self._given(found))
        found.encoded = EncodedTexts(self.texts.fingerprint, dict(zip(prompts, features, strict=True)))
        return found

    def __call__(
        self,
        images: Any,
        labels: Labels | Vocabulary,
        *,
        negative: Labels = (),
        batch_size: int = 1,
        **options: Any,
    ) -> Any:
        """Detect objects in one picture or several.

        Args:
            images: One picture (path, http(s) address, bytes, PIL image, array, tensor, open file) or a list of them.
            labels: A vocabulary, or labels in any form that `Vocabulary` takes.
            negative: Labels that compete for boxes but are left out; only with labels that are not a vocabulary.
            batch_size: Number of pictures in one forward pass. Pictures of like shape are put together.
            **options: Fields of `Options`: `threshold`, `nms_threshold`, `top_k` and so on.

        Returns:
            `Detections` for one picture, best first; a list of them for a list, in its order.

        Raises:
            TypeError: An input has another type, or there is no such option.
            ValueError: A picture or a label cannot be used.
        """
        vocabulary = _as_vocabulary(labels, {"negative": negative} if len(negative) > 0 else {})
        single = is_picture(images)
        sources = [images] if single else list(images)
        pictures = [_read(source) for source in sources]
        run = self._prepared(vocabulary, _options(options))
        found: list[Detections | None] = [None] * len(pictures)
        order = sorted(range(len(pictures)), key=lambda place: pictures[place].width / pictures[place].height)
        for start in range(0, len(order), _at_least_one(batch_size)):
            places = order[start : start + batch_size]
            for place, result in zip(
                places, run([pictures[i] for i in places], [sources[i] for i in places]), strict=True
            ):
                found[place] = result
        return found[0] if single else found

    def stream(
        self,
        images: Iterable[Any],
        labels: Labels | Vocabulary,
        *,
        negative: Labels = (),
        batch_size: int = 1,
        readers: int = 1,
        ahead: int = 4,
        **options: Any,
    ) -> Iterator[tuple[Any, Detections | DetectionError]]:
        """Detect objects in any number of pictures, in their order and in bounded memory.

        Pictures are read in other threads while the model works.

        Args:
            images: Pictures in any form that a call takes; a generator is read as it is needed.
            labels: A vocabulary, or labels in any form that `Vocabulary` takes.
            negative: Labels that compete for boxes but are left out; only with labels that are not a vocabulary.
            batch_size: Number of pictures in one forward pass.
            readers: Number of threads that read pictures.
            ahead: Number of pictures that are read before they are needed.
            **options: Fields of `Options`.

        Yields:
            Each input as it was given, with its `Detections`, or with a `DetectionError` that says why there are none.

        Raises:
            TypeError: An option is unknown.
            ValueError: A label cannot be used.
        """
        vocabulary = _as_vocabulary(labels, {"negative": negative} if len(negative) > 0 else {})
        run = self._prepared(vocabulary, _options(options))
        return self._stream(images, run, _at_least_one(batch_size), readers, max(ahead, batch_size))

    def _stream(
        self, images: Iterable[Any], run: Any, batch_size: int, readers: int, ahead: int
    ) -> Iterator[tuple[Any, Detections | DetectionError]]:
        for batch in in_batches(_attempt, images, batch_size, readers, ahead):
            yield from _run_safely(run, batch)

    def _prepared(self, vocabulary: Vocabulary, options: Options) -> Callable[..., list[Detections]]:
        """Return a function from pictures and their sources to detections, with all labels checked."""
        prompt, given = self._prompt(vocabulary), self._given(vocabulary)
        select = options.selection(vocabulary)

        def run(pictures: list[Image.Image], sources: Sequence[Any]) -> list[Detections]:
            return self._run(pictures, sources, vocabulary, prompt, given, select)

        return run

    def _prompt(self, vocabulary: Vocabulary) -> Prompt:
        prompt = vocabulary.prompt(self.processor.tokenizer, self.processor.max_text_len)
        warn_of_labels(prompt, self.processor.tokenizer, stacklevel=4)
        return prompt

    def _given(self, vocabulary: Vocabulary) -> Mapping[tuple[int, ...], torch.Tensor]:
        """Return the text features that a vocabulary brings, or raise if another model computed them."""
        if vocabulary.encoded is None:
            return {}
        if vocabulary.encoded.fingerprint != self.texts.fingerprint:
            raise ValueError(
                "The vocabulary's text features were computed by another model or in another dtype; make it again with "
                "detector.vocabulary(...)."
            )
        return vocabulary.encoded.features

    @torch.inference_mode()
    def _run(
        self,
        pictures: list[Image.Image],
        sources: Sequence[Any],
        vocabulary: Vocabulary,
        prompt: Prompt,
        given: Mapping[tuple[int, ...], torch.Tensor],
        select: Selection,
    ) -> list[Detections]:
        inputs = self.processor(images=pictures).to(self.device)
        features = self.model.get_image_features(inputs["pixel_values"], inputs["pixel_mask"], inputs["image_sizes"])
        scored = [_Scored(select, len(vocabulary)) for _ in pictures]
        per_pass = max(1, rows_at_once(features) // len(pictures))
        for start in range(0, len(prompt.chunks), per_pass):
            chunks = prompt.chunks[start : start + per_pass]
            texts = self.texts.stacked([chunk.input_ids for chunk in chunks], given)
            rows, images = features, None
            if len(chunks) > 1:
                # Row i * P + j is picture i with prompt j.
                pairs = torch.cartesian_prod(torch.arange(len(pictures)), torch.arange(len(chunks))).to(self.device)
                images = pairs[:, 0]
                rows = features_of_rows(features, images)
                texts = type(texts)(**{name: x.index_select(0, pairs[:, 1]) for name, x in texts.items()})
            outputs = self.model(image_features=rows, text_features=texts)
            logits = outputs.logits.unflatten(0, (len(pictures), len(chunks)))
            boxes = outputs.pred_boxes.unflatten(0, (len(pictures), len(chunks)))
            for image, of_image in enumerate(scored):
                for place, chunk in enumerate(chunks):
                    row = LabelledRow(image, chunk.label_indices, chunk.spans)
                    of_image.add(logits[image, place], boxes[image, place], row)
        scale = box_scale(
            [(picture.height, picture.width) for picture in pictures],
            outputs.pred_boxes[:1].expand(len(pictures), -1, -1),
        )
        return [
            of_image.detections(vocabulary, scale[image], pictures[image].size, _name(sources[image]))
            for image, of_image in enumerate(scored)
        ]


class _Scored:
    """The results of one picture so far, prompt by prompt, so that memory does not grow with the number of labels."""

    def __init__(self, select: Selection, num_labels: int) -> None:
        self.select, self.num_labels = select, num_labels
        self.parts: list[dict[str, torch.Tensor]] = []
        self.presence: dict[int, torch.Tensor] = {}

    def add(self, logits: torch.Tensor, boxes: torch.Tensor, row: LabelledRow) -> None:
        found: ScoredRow = self.select.scored(logits, row)
        self.parts.append(self.select.select(found, boxes, self.num_labels))
        self.presence |= dict(zip(found.labels.tolist(), found.scores.amax(0).tolist(), strict=True))

    def detections(
        self, vocabulary: Vocabulary, scale: torch.Tensor, size: tuple[int, int], source: str | None
    ) -> Detections:
        labels = vocabulary.labels
        found = self.select.merged(self.parts, labels, scale, scale)
        return Detections(
            found["boxes"].cpu().numpy(),
            found["scores"].cpu().numpy(),
            found["labels"].cpu().numpy(),
            labels,
            size,
            presence={label: float(self.presence[index]) for index, label in enumerate(labels)},
            source=source,
            colors=vocabulary.colors,
        )


def _as_vocabulary(labels: Labels | Vocabulary, options: Mapping[str, Any]) -> Vocabulary:
    if not isinstance(labels, Vocabulary):
        return Vocabulary(labels, **options)
    if options:
        raise TypeError(f"{', '.join(options)} cannot be given beside a Vocabulary; make it with them.")
    return labels


def _options(given: Mapping[str, Any]) -> Options:
    unknown = sorted(set(given) - set(Options.__dataclass_fields__))
    if unknown:
        raise TypeError(f"There is no option {unknown[0]!r}; choose {', '.join(Options.__dataclass_fields__)}.")
    return Options(**given)


def _at_least_one(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1.")
    return batch_size


def _read(source: Any) -> Image.Image:
    return load_image(downloaded(source))


def _attempt(source: Any) -> tuple[Any, Image.Image | DetectionError]:
    """Read a picture; a picture that cannot be read is a value, because it must not end a stream."""
    try:
        return source, _read(source)
    # Decoders raise exceptions of any type on damaged files.
    except Exception as error:
        return source, _error(source, error)


def _error(source: Any, error: Exception) -> DetectionError:
    why = str(error) if isinstance(error, PictureError) else f"{reason(error, name_file=True, most_lines=3)}."
    found = DetectionError(source, why)
    found.__cause__ = error
    return found


def _run_safely(run: Any, batch: Sequence[tuple[Any, Any]]) -> Iterator[tuple[Any, Detections | DetectionError]]:
    """Run a batch; if it fails, run its pictures one by one, so that only the culprit has no detections."""
    readable = [(source, picture) for source, picture in batch if isinstance(picture, Image.Image)]
    results: list[Detections | DetectionError]
    try:
        results = run([picture for _, picture in readable], [source for source, _ in readable]) if readable else []
    except Exception as error:
        if len(readable) == 1:
            results = [_error(readable[0][0], error)]
        else:
            results = [next(_run_safely(run, [pair]))[1] for pair in readable]
    finished = iter(results)
    for source, picture in batch:
        yield source, next(finished) if isinstance(picture, Image.Image) else picture


def _name(source: Any) -> str | None:
    """Return the name of an input, if it has one."""
    if isinstance(source, str):
        return source if len(source) < 1000 else None
    return os.fspath(source) if isinstance(source, os.PathLike) else getattr(source, "filename", None) or None


def _processor_of(model: Any) -> Any:
    from ..model.processing_gdino import GDinoProcessor

    where = model.name_or_path
    try:
        return GDinoProcessor.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {where or 'in memory'} has no processor beside it; pass processor=.") from error


def _check_int8(device: torch.device, optimize: bool) -> None:
    """Raise if int8 cannot run here, before a model is loaded or downloaded."""
    from ..inference.int8_linear import check_int8

    if device.type != "cpu" or not optimize:
        raise ValueError("int8 is for optimized models on a CPU; choose float32, bfloat16 or float16.")
    check_int8(device, torch.float32)
