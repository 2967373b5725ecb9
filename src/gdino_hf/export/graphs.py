"""The graphs that are exported: modules with tensors in and a dict of tensors out, and what they are traced with.

`WholeGraph` is the whole model. `TextGraph` and `ImageGraph` are its two sides, so that a prompt is encoded once for
any number of images. `BakedGraph` has the features of one prompt as constants and no text encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from ..model.outputs_gdino import GDinoTextFeatures
from ..model.phrase_structure import phrase_structure

# Sides of the example that the graphs are traced with. Each pyramid level has several cells on each side: sizes of one
# would become constants of the graph.
_HEIGHT, _WIDTH = 192, 320
FIXED_TOKENS = 64
"""Tokens of the prompt of a graph of fixed sizes, to which shorter prompts are padded."""
_IMAGE_AXES = {"pixel_values": ("batch", None, "height", "width"), "pixel_mask": ("batch", "height", "width")}
_TEXT_AXES = {
    "input_ids": ("batch", "tokens"),
    "attention_mask": ("batch", "tokens"),
    "text_features": ("batch", "tokens", None),
}


@dataclass(frozen=True)
class GraphPlan:
    """One graph of an exported folder.

    Attributes:
        role: "model" for a graph that is the whole detector, "text" or "image" for one of its sides.
        module: What is traced.
        inputs: Example of each input, by name.
        outputs: Axes of each output, by name.
    """

    role: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: dict[str, tuple[Any, ...]]

    def axes(self, name: str) -> tuple[Any, ...]:
        """Return what each axis of an input is: the name of a dynamic axis, or a fixed number."""
        named = (_IMAGE_AXES | _TEXT_AXES)[name]
        return tuple(axis or size for axis, size in zip(named, self.inputs[name].shape, strict=True))

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """Return the dynamic axes in the form that torch.export takes."""
        return {
            name: {place: Dim.AUTO for place, axis in enumerate(self.axes(name)) if isinstance(axis, str)}
            for name in self.inputs
        }


class WholeGraph(nn.Module):
    """Image and tokens in, token logits and boxes out.

    Args:
        model: A `GDinoForObjectDetection` in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> dict[str, Tensor]:
        """Return logits (B, Q, T) and pred_boxes (B, Q, 4) cxcywh in [0, 1]; see `GDinoForObjectDetection.forward`."""
        outputs = self.model(
            pixel_values=pixel_values, pixel_mask=pixel_mask, input_ids=input_ids, attention_mask=attention_mask
        )
        return _detections(outputs, input_ids.shape[1])


class TextGraph(nn.Module):
    """Tokens in, text features out.

    Args:
        model: A `GDinoForObjectDetection` in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Return text_features (B, T, D) of the prompts (B, T)."""
        return {"text_features": self.model.get_text_features(input_ids, attention_mask).last_hidden_state}


class ImageGraph(nn.Module):
    """Image and text features in, token logits and boxes out.

    The tokens are inputs, too: which of them form a phrase follows from them.

    Args:
        model: A `GDinoForObjectDetection` in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.special_token_ids = model.config.special_token_ids

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor,
        text_features: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
    ) -> dict[str, Tensor]:
        """Return logits (B, Q, T) and pred_boxes (B, Q, 4) cxcywh in [0, 1]."""
        phrases = phrase_structure(input_ids, attention_mask, self.special_token_ids)
        features = GDinoTextFeatures(
            last_hidden_state=text_features,
            input_ids=input_ids,
            attention_mask=attention_mask.bool(),
            phrase_ids=phrases.phrase_ids,
            phrase_mask=phrases.phrase_mask,
            position_ids=phrases.position_ids,
        )
        outputs = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask, text_features=features)
        return _detections(outputs, input_ids.shape[1])


class BakedGraph(nn.Module):
    """Image in, token logits and boxes of one fixed prompt out.

    Args:
        model: A `GDinoForObjectDetection` in evaluation mode.
        input_ids: (T,) tokens of the prompt.
    """

    def __init__(self, model: Any, input_ids: Tensor) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            features = model.get_text_features(input_ids[None])
        self._names = [name for name, value in features.items() if isinstance(value, Tensor)]
        for name in self._names:
            self.register_buffer(name, features[name].clone(), persistent=False)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> dict[str, Tensor]:
        """Return logits (B, Q, T) and pred_boxes (B, Q, 4) cxcywh in [0, 1]."""
        batch = pixel_values.shape[0]
        constants = {name: getattr(self, name) for name in self._names}
        features = GDinoTextFeatures(**{name: x.expand(batch, *x.shape[1:]) for name, x in constants.items()})
        outputs = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask, text_features=features)
        return _detections(outputs, features.input_ids.shape[1])


def _detections(outputs: Any, num_tokens: int) -> dict[str, Tensor]:
    """Return what a graph gives out. The model pads logits to its longest prompt with -inf; a graph does not."""
    return {"logits": outputs.logits[:, :, :num_tokens], "pred_boxes": outputs.pred_boxes}


def plan_graphs(
    model: Any, variant: str, prompt: Any = None, fixed_size: tuple[int, int] | None = None
) -> list[GraphPlan]:
    """Return the graphs of a variant, with examples of their inputs.

    Args:
        model: A `GDinoForObjectDetection` in evaluation mode.
        variant: "whole", "split" or "baked".
        prompt: The prompt of a baked graph, whose only chunk has its tokens.
        fixed_size: (height, width) of the only picture that a graph of fixed sizes takes; None for dynamic sizes.

    Returns:
        One graph, or two for "split": text and image.
    """
    queries = model.config.num_queries
    image = _example_image(fixed_size)
    outputs: dict[str, tuple[Any, ...]]
    if variant == "baked":
        tokens = torch.tensor(prompt.chunks[0].input_ids)
        outputs = {"logits": ("batch", queries, len(tokens)), "pred_boxes": ("batch", queries, 4)}
        return [GraphPlan("model", BakedGraph(model, tokens).eval(), image, outputs)]
    outputs = {"logits": ("batch", queries, "tokens"), "pred_boxes": ("batch", queries, 4)}
    text = _example_text(model.config, padded_to=None if fixed_size is None else FIXED_TOKENS)
    if variant == "whole":
        return [GraphPlan("model", WholeGraph(model).eval(), image | text, outputs)]
    width = model.config.d_model
    features = torch.randn(*text["input_ids"].shape, width, generator=torch.Generator().manual_seed(0))
    return [
        GraphPlan("text", TextGraph(model).eval(), text, {"text_features": ("batch", "tokens", width)}),
        GraphPlan("image", ImageGraph(model).eval(), image | {"text_features": features} | text, outputs),
    ]


def _example_image(fixed_size: tuple[int, int] | None) -> dict[str, Tensor]:
    """Return two images, one of which is padded, so that no part of the graph is left out; or one of a fixed size."""
    if fixed_size is not None:
        pixels = torch.randn(1, 3, *fixed_size, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": pixels, "pixel_mask": torch.ones(1, *fixed_size, dtype=torch.int64)}
    mask = torch.ones(2, _HEIGHT, _WIDTH, dtype=torch.int64)
    mask[1, :, _WIDTH // 2 :] = 0
    pixels = torch.randn(2, 3, _HEIGHT, _WIDTH, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "pixel_mask": mask}


def _example_text(config: Any, padded_to: int | None) -> dict[str, Tensor]:
    """Return two prompts of two phrases each, one of which is padded, or one of a fixed length; any tokens will do."""
    start, end, *marks = config.special_token_ids
    special = set(config.special_token_ids)
    word = next(token for token in range(config.text_config.vocab_size - 1, 0, -1) if token not in special)
    mark = marks[0] if marks else end
    row = [start, word, mark, word, word, mark, end]
    if padded_to is not None:
        padding = min(padded_to, config.max_text_len) - len(row)
        mask = torch.tensor([[1] * len(row) + [0] * padding])
        return {"input_ids": torch.tensor([row + [0] * padding]), "attention_mask": mask}
    mask = torch.ones(2, len(row), dtype=torch.int64)
    mask[1, -2:] = 0
    return {"input_ids": torch.tensor([row, row]), "attention_mask": mask}
