"""An exported folder in the place of a model: what `Detector` asks of a model, computed by another runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..model.configuration_gdino import GDinoConfig
from ..model.outputs_gdino import GDinoImageFeatures, GDinoTextFeatures
from ..model.printable import printable
from ..model.text_prompt import Prompt, spans_from_ids
from .baked_labels import in_baked_prompt, unknown_label
from .exported_folder import ExportedFolder, ExportError
from .exported_graphs import load_graphs


class ExportedModel:
    """The graphs of an exported folder, called like a `GDinoForObjectDetection` with features of images and prompts.

    Pictures run in groups of one size, so a batch gives each the results that it has alone.

    Args:
        folder: A folder that `gdino_hf.export.export` wrote.
        tokenizer: Its tokenizer, which names labels in messages.

    Raises:
        ExportError: A file is damaged, or the runtime is missing or too old.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    training = False
    _optimized = False

    def __init__(self, folder: str | Path, tokenizer: Any) -> None:
        self.folder = ExportedFolder.read(folder)
        self.name_or_path = str(folder)
        self.config = GDinoConfig.from_pretrained(folder)
        self._tokenizer = tokenizer
        self._graphs = load_graphs(self.folder)
        self._main = self._graphs["image" if "image" in self._graphs else "model"]
        digests = bytes.fromhex("".join(self.folder.digests.values()))
        # Identifies the text features, which Detector hashes the weights of a model's text encoder for.
        text = SimpleNamespace(state_dict=lambda: {"files": torch.tensor(list(digests))})
        self.base_model = SimpleNamespace(
            level_embed=torch.empty(0), config=self.config, text_backbone=text, text_projection=text
        )

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The labels that were baked in; None if any can be given."""
        return None if self.folder.labels is None else self.folder.labels.names

    def check_prompt(self, prompt: Prompt) -> None:
        """Check that a prompt has no other labels than those that were baked in, if there are any.

        Raises:
            ExportError: It has others.
        """
        if self.folder.labels is not None:
            in_baked_prompt(self.folder, prompt, self._tokenizer)

    def eval(self) -> ExportedModel:
        """Return the model itself, which cannot be trained."""
        return self

    def train(self, mode: bool = True) -> ExportedModel:
        """Return the model itself.

        Raises:
            ValueError: `mode` is true.
        """
        if mode:
            raise ExportError(f"{self._name} is an exported model; train the one that it was exported from.")
        return self

    def to(self, device: Any) -> ExportedModel:
        """Return the model itself: its runtime computes on the CPU, whatever the device."""
        return self

    def get_image_features(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, image_sizes: Any = None
    ) -> GDinoImageFeatures:
        """Return pixels (B, 3, H, W) and masks (B, H, W) as they are; the image backbone is inside the graph."""
        if pixel_mask is None:
            pixel_mask = torch.ones_like(pixel_values[:, 0], dtype=torch.int64)
        return GDinoImageFeatures(feature_maps=(pixel_values,), masks=(pixel_mask,), padding_seen=False)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> GDinoTextFeatures:
        """Return the text features (R, T, D) of prompts, empty ones (R, T, 0) if no graph of its own computes them."""
        if "text" in self._graphs:
            hidden = self._graphs["text"]({"input_ids": input_ids, "attention_mask": attention_mask.long()})
            return GDinoTextFeatures(last_hidden_state=hidden["text_features"])
        return GDinoTextFeatures(last_hidden_state=torch.empty(*input_ids.shape, 0))

    def __call__(
        self,
        *,
        text_features: GDinoTextFeatures,
        image_features: GDinoImageFeatures | None = None,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        image_sizes: Any = None,
    ) -> SimpleNamespace:
        """Detect.

        Args:
            text_features: Tokens of R prompts, and their features if the graph needs them.
            image_features: What `get_image_features` returned; without it, pixel_values and pixel_mask are read.
            pixel_values: (B, 3, H, W) normalized pixels.
            pixel_mask: (B, H, W) mask, nonzero on real pixels.
            image_sizes: Not read: the mask has the sizes.

        Returns:
            logits (R, Q, max_text_len) and pred_boxes (R, Q, 4) cxcywh in [0, 1].

        Raises:
            ExportError: The graph cannot take pictures or prompts of these sizes, or a label was not baked in.
        """
        if image_features is None:
            assert pixel_values is not None
            image_features = self.get_image_features(pixel_values, pixel_mask)
        assert image_features.masks is not None
        pixels, masks = image_features.feature_maps[0], image_features.masks[0]
        rows = max(len(pixels), len(text_features.input_ids))
        sizes = [(int(mask[:, 0].count_nonzero()), int(mask[0].count_nonzero())) for mask in masks]
        pixels, sizes = pixels.expand(rows, -1, -1, -1), sizes * (rows // len(sizes))
        text = {
            "input_ids": text_features.input_ids.expand(rows, -1),
            "attention_mask": text_features.attention_mask.long().expand(rows, -1),
            "text_features": text_features.last_hidden_state.expand(rows, -1, -1),
        }
        queries = self.config.num_queries
        logits = torch.full((rows, queries, self.config.max_text_len), -torch.inf)
        boxes = torch.empty(rows, queries, 4)
        for height, width in dict.fromkeys(sizes):
            places = [row for row in range(rows) if sizes[row] == (height, width)]
            part = {name: value[places].contiguous() for name, value in text.items()}
            found = self._run(pixels[places, :, :height, :width].contiguous(), part)
            logits[places, :, : found["logits"].shape[-1]] = found["logits"]
            boxes[places] = found["pred_boxes"]
        return SimpleNamespace(logits=logits, pred_boxes=boxes)

    def _run(self, pixels: Tensor, text: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph on pictures of one size."""
        image = {
            "pixel_values": pixels,
            "pixel_mask": torch.ones(len(pixels), *pixels.shape[2:], dtype=torch.int64),
        }
        shape = self._main.inputs["pixel_values"].shape
        # A graph of fixed sizes takes one picture at a time.
        fixed = shape[0] is not None
        tokens = text["input_ids"].shape[1]
        if fixed and (1, *pixels.shape[1:]) != shape:
            raise ExportError(
                f"{self._name} takes pictures of {shape[2]}x{shape[3]} pixels (height x width), and this one has "
                f"{pixels.shape[2]}x{pixels.shape[3]} after resizing; export the model with dynamic sizes."
            )
        if fixed and self.folder.labels is None:
            text = self._padded_text(text, self._main.inputs["input_ids"].shape[1])
        steps = [slice(row, row + 1) for row in range(len(pixels))] if fixed else [slice(None)]
        inputs = image | text
        parts = [self._main({name: value[step] for name, value in inputs.items()}) for step in steps]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self.folder.labels is not None:
            rows = zip(found["logits"], text["input_ids"].tolist(), strict=True)
            found["logits"] = torch.stack([self._of_prompt(row, ids) for row, ids in rows])
        found["logits"] = found["logits"][..., :tokens]
        return found

    @property
    def _name(self) -> str:
        return printable(self.folder.path)

    def _padded_text(self, text: dict[str, Tensor], tokens: int | None) -> dict[str, Tensor]:
        given = text["input_ids"].shape[1]
        missing = (given if tokens is None else tokens) - given
        if missing < 0:
            raise ExportError(
                f"The labels have {given} tokens, and {self._name} takes {tokens}; ask for fewer labels at a time, or "
                "export the model with dynamic text."
            )
        padding = (0, missing)
        return {
            "input_ids": torch.nn.functional.pad(text["input_ids"], padding, value=self.folder.text["pad_id"]),
            "attention_mask": torch.nn.functional.pad(text["attention_mask"], padding),
            "text_features": torch.nn.functional.pad(text["text_features"], (0, 0, *padding)),
        }

    def _of_prompt(self, logits: Tensor, input_ids: Sequence[int]) -> Tensor:
        """Return the logits (Q, T) of a prompt from those of the baked one: columns of equal phrases."""
        assert self.folder.labels is not None
        places = self.folder.labels.span_of_phrase
        end_id = self.folder.text["end_id"]
        real = list(input_ids[: input_ids.index(end_id) + 1]) if end_id in input_ids else list(input_ids)
        chosen = torch.full((len(logits), len(input_ids)), -torch.inf)
        for start, end in spans_from_ids(real, self.config.special_token_ids, len(real)):
            place = places.get(tuple(real[start:end]))
            if place is None:
                raise ExportError(unknown_label(self.folder, self._tokenizer.decode(real[start:end])))
            chosen[:, start:end] = logits[:, slice(*place)]
        return chosen
