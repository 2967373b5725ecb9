"""Rows of a detection data set to a batch the model trains on."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import ImageOps

from .negatives import name_key


class GDinoDataCollator:
    """Augment, choose each image's labels, and let the processor do the rest.

    Args:
        processor: A GDinoProcessor.
        labels: The labels of every prompt; for evaluation, or a data set of few names.
        prompt_sampler: Chooses the labels of each prompt from the image's names; see `PromptSampler`. Without it and
            without labels, a prompt holds the names of its own batch.
        transform: Augmentation of one row; see transforms.py.
        seed: Of the collator's own random numbers. Workers of a data loader draw different ones.
        return_text: Also hand on each image's labels, as "text"; the model does not take them.

    Raises:
        ValueError: Both labels and prompt_sampler are given.
    """

    def __init__(
        self,
        processor: Any,
        labels: Sequence[str] | None = None,
        prompt_sampler: Callable[[Sequence[str], random.Random], list[str]] | None = None,
        transform: Callable[[dict[str, Any], random.Random], dict[str, Any]] | None = None,
        seed: int = 0,
        return_text: bool = False,
    ) -> None:
        if labels is not None and prompt_sampler is not None:
            raise ValueError("labels and prompt_sampler exclude each other; give one of them.")
        self.processor = processor
        self.labels = list(labels) if labels is not None else None
        self.prompt_sampler = prompt_sampler
        self.transform = transform
        self.seed = seed
        self.return_text = return_text
        self._rng: random.Random | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            rows: Each with "image" (PIL), "boxes" (N, 4) xyxy in pixels, "names" (N) and optionally "crowd" (N); crowds
                are left out.

        Returns:
            The model's inputs with `labels`, and "text" (B lists of labels) if asked for.

        Raises:
            ValueError: A name is not among the fixed labels.
        """
        rng = self._random()
        # Upright before any transform: annotated boxes are pixels of the picture as people see it.
        examples = [{**row, "image": ImageOps.exif_transpose(row["image"])} for row in rows]
        if self.transform is not None:
            examples = [self.transform(example, rng) for example in examples]
        found = [_objects(example) for example in examples]
        everything = list(dict.fromkeys(name for _, names in found for name in names))
        texts, annotations = [], []
        for boxes, names in found:
            if self.prompt_sampler is not None:
                text = self.prompt_sampler(names, rng)
            else:
                text = self.labels if self.labels is not None else (everything or ["object"])
            text, kept = self._fit(list(text), names)
            texts.append(text)
            annotations.append(
                {
                    "annotations": [
                        {"bbox": [x1, y1, x2 - x1, y2 - y1], "label": name}
                        for (x1, y1, x2, y2), name in zip(boxes.tolist(), names, strict=True)
                        if kept is None or name_key(name) in kept
                    ]
                }
            )
        images = [example["image"].convert("RGB") for example in examples]
        batch = dict(self.processor(images=images, text=texts, annotations=annotations))
        return {**batch, "text": texts} if self.return_text else batch

    def _fit(self, text: list[str], names: Sequence[str]) -> tuple[list[str], set[str] | None]:
        """Leave labels out until one prompt holds them: absent ones first. Also which names are left, None if all."""
        positives = {name_key(name) for name in names}
        while len(self._prompt(text).chunks) > 1:
            absent = [label for label in text if name_key(label) not in positives]
            if not absent:
                first = self._prompt(text).chunks[0]
                text = [text[index] for index in first.label_indices]
                return text, {name_key(label) for label in text}
            dropped = set(absent[-max(1, len(absent) // 8) :])
            text = [label for label in text if label not in dropped]
        return text, None

    def _prompt(self, text: list[str]) -> Any:
        from ..model.text_prompt import build_prompt

        return build_prompt(text, self.processor.tokenizer, self.processor.max_text_len)

    def _random(self) -> random.Random:
        if self._rng is None:
            from torch.utils.data import get_worker_info

            worker = get_worker_info()
            self._rng = random.Random(self.seed if worker is None else f"{self.seed}-{worker.id}-{worker.seed}")
        return self._rng


def _objects(example: Mapping[str, Any]) -> tuple[np.ndarray, list[str]]:
    """Boxes (N, 4) and names of what is not a crowd."""
    boxes = np.asarray(example["boxes"], dtype=np.float64).reshape(-1, 4)
    names = [str(name) for name in example["names"]]
    crowd = example.get("crowd")
    if crowd is None:
        return boxes, names
    single = [index for index, flag in enumerate(crowd) if not flag]
    return boxes[single], [names[index] for index in single]
