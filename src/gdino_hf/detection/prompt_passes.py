"""Forward passes of a batch of pictures over all prompts, and from their outputs to detections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..inference.workers import only_blocks
from ..model.box_ops import box_scale
from ..model.grounded_results import LabelledRow, Selection
from ..model.prompt_groups import features_of_rows, rows_at_once
from ..model.text_prompt import PromptChunk
from .detection_options import DetectionOptions
from .detections import Detections, name_of
from .prepared_images import join_images
from .text_features import TextFeatureStore, Tokens
from .vocabulary import Vocabulary


@dataclass(frozen=True)
class Options(DetectionOptions):
    """Which boxes become detections: `DetectionOptions`, and the rule that follows from them."""

    def selection(self, vocabulary: Vocabulary) -> Selection:
        """Return the rule by which a vocabulary's scores become detections.

        Raises:
            ValueError: A value is out of its range.
        """
        return self.rule(vocabulary.thresholds(self.threshold), "mean" if vocabulary.combine == "mean" else "max")

    def rule(self, thresholds: Tensor, phrases: Literal["max", "mean"]) -> Selection:
        """Return the rule for labels with these thresholds (N,), whose phrases are combined as given."""
        return Selection(**self.values_of_rule(thresholds, phrases))


@dataclass(frozen=True)
class Asked:
    """What to look for, ready for a model.

    Attributes:
        names: Labels that results may carry; label indices from `len(names)` on are negative labels.
        chunks: The prompts.
        select: Rule by which scores become detections.
        given: Text features that were computed before, by the tokens of a prompt.
        colors: "#rrggbb" of labels that have a colour of their own.
        details: Function from a picture's results to further attributes of its `Detections`; None for none.
        top_k_per_prompt: Largest number of results of one prompt in a picture; None keeps all.
        remarks: What is odd about the phrases of a caption, one sentence each.
    """

    names: tuple[str, ...]
    chunks: tuple[PromptChunk, ...]
    select: Selection
    given: Mapping[Tokens, Tensor] = field(default_factory=dict)
    colors: Mapping[str, str] = field(default_factory=dict)
    details: Callable[[ScoredPicture], dict[str, Any]] | None = None
    top_k_per_prompt: int | None = None
    remarks: tuple[str, ...] = ()


class ScoredPicture:
    """The results of one picture so far, prompt by prompt, so that memory does not grow with the number of labels.

    Attributes:
        found: After `finish`, the picture's results as `Selection.merged` returns them.
        logits: (Q, T) token logits of the latest prompt.
    """

    def __init__(self, asked: Asked, size: tuple[int, int], source: Any) -> None:
        self.asked, self.size, self.source = asked, size, source
        self.found: dict[str, Any] = {}
        self.logits: Tensor | None = None
        self._parts: list[dict[str, Tensor]] = []
        self._highest: list[tuple[Tensor, Tensor]] = []

    def add(self, logits: Tensor, boxes: Tensor, row: LabelledRow) -> None:
        """Add the outputs of one prompt: logits (Q, T) and boxes (Q, 4) cxcywh in [0, 1]."""
        found = self.asked.select.scored(logits, row)
        part = self.asked.select.select(found, boxes, len(self.asked.names))
        if self.asked.top_k_per_prompt is not None:
            best = part["scores"].argsort(descending=True, stable=True)[: self.asked.top_k_per_prompt]
            part = {name: value[best] for name, value in part.items()}
        self._parts.append(part)
        # Tensors, because a number for each prompt would wait for the device as often.
        self._highest.append((found.labels, found.scores.amax(0)))
        self.logits = logits

    def finish(self, scale: Tensor) -> None:
        """Merge the results of all prompts; `scale` (4,) has the factors from 0..1 to pixels."""
        self.found = self.asked.select.merged(self._parts, self.asked.names, scale, scale)
        self._parts = []

    def detections(self) -> Detections:
        """Return the picture's detections."""
        values = {} if self.asked.details is None else self.asked.details(self)
        labels, scores = (torch.cat(part).tolist() for part in zip(*self._highest, strict=True))
        presence = dict(zip(labels, scores, strict=True))
        return Detections(
            self.found["boxes"].cpu().numpy(),
            self.found["scores"].cpu().numpy(),
            self.found["labels"].cpu().numpy(),
            self.asked.names,
            self.size,
            presence={name: presence[index] for index, name in enumerate(self.asked.names)},
            source=name_of(self.source),
            colors=self.asked.colors,
            **values,
        )


@torch.no_grad()
def score_pictures(
    model: Any, texts: TextFeatureStore, asked: Asked, prepared: Sequence[Any], sources: Sequence[Any]
) -> list[ScoredPicture]:
    """Run a batch of pictures over all prompts.

    The image backbone runs once. Each further pass has as many prompts as `rows_at_once` allows.

    Args:
        model: A `GDinoForObjectDetection`.
        texts: Store of its text features.
        asked: What to look for.
        prepared: What `prepare_image` returned for each picture, at least one.
        sources: Where each picture came from.

    Returns:
        The finished results of each picture.
    """
    sizes = [size for item in prepared for size in item.original_sizes]
    scored = [
        ScoredPicture(asked, (width, height), source) for (height, width), source in zip(sizes, sources, strict=True)
    ]
    with _threads_for_blocks(model):
        for place, chunk, logits, boxes in prompt_outputs(model, texts, asked.chunks, prepared, asked.given):
            scored[place].add(logits, boxes, LabelledRow(place, chunk.label_indices, chunk.spans))
        scales = box_scale(sizes, torch.empty(len(scored), 0, 4, device=model.device))
        for of_picture, scale in zip(scored, scales, strict=True):
            of_picture.finish(scale)
    return scored


def prompt_outputs(
    model: Any,
    texts: TextFeatureStore,
    chunks: Sequence[PromptChunk],
    prepared: Sequence[Any],
    given: Mapping[Tokens, Tensor] | None = None,
) -> Iterator[tuple[int, PromptChunk, Tensor, Tensor]]:
    """Run a batch of pictures over prompts, and yield the outputs of each pair; call it without gradients.

    Args:
        model: A `GDinoForObjectDetection`.
        texts: Store of its text features.
        chunks: The prompts.
        prepared: What `prepare_image` returned for each picture, at least one.
        given: Text features that were computed before, by the tokens of a prompt.

    Yields:
        Index of the picture, the prompt, its token logits (Q, T) and its boxes (Q, 4) cxcywh in [0, 1].
    """
    inputs = join_images(prepared, model.device)
    features = model.get_image_features(inputs["pixel_values"], inputs["pixel_mask"], inputs["image_sizes"])
    texts.make_room([chunk.input_ids for chunk in chunks])
    per_pass = max(1, rows_at_once(features) // len(prepared))
    for start in range(0, len(chunks), per_pass):
        group = chunks[start : start + per_pass]
        shape = (len(prepared), len(group))
        text_features: Any = texts.stacked([chunk.input_ids for chunk in group], given)
        rows = features
        if len(group) > 1:
            # Row i * P + j is picture i with prompt j.
            image, prompt = (
                x.flatten().to(model.device) for x in torch.meshgrid(*map(torch.arange, shape), indexing="ij")
            )
            rows = features_of_rows(features, image)
            text_features = type(text_features)(**{name: x[prompt] for name, x in text_features.items()})
        outputs = model(image_features=rows, text_features=text_features)
        logits, boxes = outputs.logits.unflatten(0, shape), outputs.pred_boxes.unflatten(0, shape)
        for place in range(len(prepared)):
            for number, chunk in enumerate(group):
                yield place, chunk, logits[place, number], boxes[place, number]


@torch.no_grad()
def outputs_of_own_prompts(
    model: Any, texts: TextFeatureStore, chunks: Sequence[PromptChunk], prepared: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    """Run a batch of pictures, each with a prompt of its own, in one forward pass.

    Args:
        model: A `GDinoForObjectDetection`.
        texts: Store of its text features.
        chunks: The prompt of each picture.
        prepared: What `prepare_image` returned for each picture, at least one.

    Returns:
        Token logits (B, Q, T) and boxes (B, Q, 4) cxcywh in [0, 1].
    """
    text_features = texts.stacked([chunk.input_ids for chunk in chunks])
    with _threads_for_blocks(model):
        outputs = model(**join_images(prepared, model.device), text_features=text_features)
    return outputs.logits, outputs.pred_boxes


def _threads_for_blocks(model: Any) -> AbstractContextManager[None]:
    """Let an optimized model on a CPU use several threads for the blocks of its packed layers alone.

    Splitting the many small operations over threads costs more than it gains.
    """
    return only_blocks() if model._optimized and model.device.type == "cpu" else nullcontext()
