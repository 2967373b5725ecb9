"""Our classes under the names and conventions of transformers' Grounding DINO, which `drop_in` makes transformers load.

Programs recognize a model by the name of its class, and read strings from the "labels" of results. These subclasses
have those names and return such results; everything else is inherited.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..model.configuration_gdino import GDinoConfig
from ..model.modeling_gdino import GDinoForObjectDetection, GDinoModel
from ..model.processing_gdino import GDinoInputs, GDinoProcessor

_THRESHOLD = 0.25


class GroundingDinoConfig(GDinoConfig):
    """A `GDinoConfig` whose name tells programs that the model is a Grounding DINO; saved files say `gdino`."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save as `GDinoConfig` does, with the names of the classes that the stand-ins inherit from."""
        names: list[str] = getattr(self, "architectures", None) or []
        self.architectures = [name.replace("GroundingDino", "GDino") for name in names] or None
        return super().save_pretrained(*args, **kwargs)


class _StandIn:
    """Takes a configuration of transformers' own classes where the model wants one of ours."""

    config_class = GroundingDinoConfig
    # A stand-in is never saved as custom code, also if the class it inherits from is.
    _auto_class = None

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig) and not isinstance(config, GroundingDinoConfig):
            kwargs["config"] = GroundingDinoConfig.from_dict(config.to_dict())
        return super().from_pretrained(*args, **kwargs)  # type: ignore[misc]


class GroundingDinoModel(_StandIn, GDinoModel):
    """`GDinoModel` under the name of transformers' class."""


class GroundingDinoForObjectDetection(_StandIn, GDinoForObjectDetection):
    """`GDinoForObjectDetection` under the name of transformers' class."""


class GroundingDinoProcessor(GDinoProcessor):
    """`GDinoProcessor` with the conventions of transformers' class.

    Text is read as transformers reads it: only periods separate labels. "labels" of results are strings in lower case.
    Each is a whole label, where transformers may return part of one or several joined together, and is written as the
    caller wrote it ("t-shirt"), where transformers joins its tokens ("t - shirt").
    """

    _KEPT_PROMPTS = 256

    def __call__(self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any) -> GDinoInputs:
        """Prepare images and labels for the model.

        Args:
            images: One image or a list; see `GDinoProcessor`.
            text: Labels as a list (["a cat", "a dog"]), or as text ("a cat. a dog."), for all images; or one of either
                for each image. A list of strings of which any has a period is one text per image.
            *args: Further arguments of `GDinoProcessor`.
            **kwargs: Further arguments of `GDinoProcessor`.

        Returns:
            See `GDinoProcessor`.
        """
        inputs = super().__call__(images, _labels_of(text), *args, **kwargs)
        for prompt in inputs.prompts or ():
            for chunk in prompt.chunks:
                self._keep(chunk.input_ids, [prompt.labels[index].lower() for index in chunk.label_indices])
        return inputs

    def post_process_grounded_object_detection(  # type: ignore[override]
        self,
        outputs: Any,
        input_ids: Any = None,
        threshold: float | None = None,
        text_threshold: float = 0.25,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        text_labels: Any = None,
        box_threshold: float | None = None,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """Turn model outputs into boxes with labels, with the arguments and results of transformers' method.

        Args:
            outputs: Model output with logits (R, Q, max_text_len) and pred_boxes (R, Q, 4).
            input_ids: (R, T) tokens of the prompts, or the object this processor returned, which is needed if the
                labels of an image take several prompts. Default: the input_ids of the model output.
            threshold: Score that results must exceed, 0..1; None for 0.25.
            text_threshold: In transformers, the score above which a word becomes part of a box's label. Here labels
                are whole, so it has no effect, unless `input_ids` is the processor's object: then it is the lowest
                score of a label's best token.
            target_sizes: (height, width) of each image in pixels; None leaves boxes in 0..1.
            text_labels: Not used, as in transformers: labels are read from the tokens.
            box_threshold: Former name of `threshold`.
            **kwargs: Further arguments of `GDinoProcessor.post_process_grounded_object_detection`.

        Returns:
            For each image, best first: "scores" (N,), "boxes" (N, 4) float32 xyxy, and "text_labels" and "labels", N
            strings each.

        Raises:
            ValueError: A threshold is outside 0..1, or the numbers of prompts and images differ.
        """
        if box_threshold is not None:
            if threshold is not None and threshold != box_threshold:
                raise ValueError(f"threshold {threshold} and box_threshold {box_threshold} differ; give one.")
            warnings.warn("box_threshold is now called threshold; use that name.", FutureWarning, stacklevel=2)
            threshold = box_threshold
        results = super().post_process_grounded_object_detection(
            outputs,
            input_ids,
            threshold=_THRESHOLD if threshold is None else threshold,
            text_threshold=0.0 if getattr(input_ids, "prompts", None) is None else text_threshold,
            target_sizes=target_sizes,
            **kwargs,
        )
        if getattr(input_ids, "prompts", None) is None:
            for result, words in zip(results, self._words(outputs, input_ids), strict=False):
                if words is not None:
                    result["text_labels"] = [words[index] for index in result["labels"].tolist()]
        return [{**result, "labels": result["text_labels"]} for result in results]

    def _keep(self, tokens: Sequence[int], words: list[str]) -> None:
        """Remember the labels of a prompt, of which scripts keep only the tokens."""
        # Not an argument of __init__, because transformers saves those.
        kept = self.__dict__.setdefault("_words_of_tokens", {})
        kept[tuple(tokens)] = words
        while len(kept) > self._KEPT_PROMPTS:
            kept.pop(next(iter(kept)), None)

    def _words(self, outputs: Any, input_ids: Any) -> list[list[str] | None]:
        """Return the labels of each row of logits, or None for a prompt that this processor did not make."""
        ids = input_ids.get("input_ids") if isinstance(input_ids, Mapping) else input_ids
        rows = torch.as_tensor(outputs.input_ids if ids is None else ids).tolist()
        kept, pad = self.__dict__.get("_words_of_tokens", {}), self.tokenizer.pad_token_id
        words = [kept.get(tuple(token for token in row if token != pad)) for row in rows]
        return words * outputs.logits.shape[0] if len(words) == 1 else words

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved: the class of a saved processor is `GDinoProcessor`, as its model's type is `gdino`."""
        return {**super().to_dict(), "processor_class": GDinoProcessor.__name__}


def _labels_of(text: Any) -> Any:
    """Return labels in the form that `GDinoProcessor` takes: for all images as a list, or as a list of lists."""
    if isinstance(text, str):
        return _split(text)
    if not isinstance(text, Sequence) or isinstance(text, (bytes, Mapping)):
        return text
    if all(isinstance(each, str) and "." not in each for each in text):
        return list(text)
    return [_split(each) if isinstance(each, str) else each for each in text]


def _split(text: str) -> list[str]:
    return [label.strip() for label in text.split(".") if label.strip()]
