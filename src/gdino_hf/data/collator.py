"""The data collator: rows of a detection or grounding data set become a batch the model trains on."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..error_text import reason
from ..model.caption_prompt import build_caption, phrase_tokens
from ..model.option_flags import checked_flag
from ..model.picture_pixels import load_image
from ..model.text_prompt import Prompt, build_prompt, shorten
from .captions import fit_caption
from .negatives import PromptSampler
from .prompt_packing import PromptPacker
from .reproducible_sampling import row_random
from .transforms import RandomChoiceResize, Transform

logger = logging.getLogger(__name__)

# Prompt of an image that has no names at all.
_NO_NAME = "object"


class GDinoDataCollator:
    """Augment each row, choose its prompt, and let the processor build the batch.

    The prompt of a row with a caption is that caption, and the targets of its boxes are the tokens of their phrases.
    The prompt of any other row is a list of labels: all of them if they fit `max_text_len`, otherwise the row's own
    names and as many randomly drawn others as fit.

    Rows from `ReproducibleDataset` or `ReproducibleStream` carry a "sample_key" that seeds their augmentation, so a
    resumed run or another process draws the same; see reproducible_sampling.py. Rows without one use the collator's
    own random generator, which a resumed run restarts.

    Args:
        processor: A GDinoProcessor.
        labels: Labels of every prompt; for evaluation, or for data sets with few names.
        prompt_sampler: Function that chooses a prompt's labels from the image's names; see `PromptSampler`. Without it
            and without `labels`, each prompt holds the names of the whole batch.
        transform: Augmentation of one row; see transforms.py and `default_transform`. None augments nothing.
        seed: Seed for augmentation and sampled negatives.
        return_text: Whether the batch also has the labels of each prompt as "text", which the model does not accept.

    Raises:
        ValueError: Both `labels` and `prompt_sampler` are given.
    """

    def __init__(
        self,
        processor: Any,
        labels: Sequence[str] | None = None,
        prompt_sampler: Callable[[Sequence[str], random.Random], list[str]] | None = None,
        transform: Transform | None = None,
        seed: int = 0,
        return_text: bool = False,
    ) -> None:
        if labels is not None and prompt_sampler is not None:
            raise ValueError("labels and prompt_sampler exclude each other; pass only one of them.")
        self.processor = processor
        self.labels = list(labels) if labels is not None else None
        self.prompt_sampler = prompt_sampler
        self.transform = transform
        self.seed = seed
        self.return_text = checked_flag(return_text, "return_text")
        self._prompts = PromptPacker(processor.tokenizer, processor.max_text_len)
        self._rng: random.Random | None = None
        self._label_keys: set[Any] | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Build a batch.

        Args:
            rows: Dicts with "image" (PIL), "boxes" ((N, 4) xyxy in pixels), "names" (N) and optionally "crowd" (N).
                Crowd boxes are dropped, and their name is not part of the prompt unless the image also has a single
                object of that name. Rows with "neg_names" (a list of names) have no other names as negatives, unless
                `labels` are given. Grounding rows also have "caption" and "spans" (N lists of [start, end)
                characters).

        Returns:
            The model's inputs with `labels`, and "text" (B lists of labels) if `return_text` is set.

        Raises:
            ValueError: A name is not among the fixed labels.
        """
        own = self._own_random()
        draws = [row_random(row, self.seed) or own for row in rows]
        if self.labels is not None:
            for row in rows:
                self._check_names(row)
        # Convert to upright RGB before any transform: boxes are pixels of the upright image, and palettes, 16-bit
        # images and transparency must become the same colours as at inference.
        examples = [{**row, "image": load_image(row["image"])} for row in rows]
        if self.transform is not None:
            examples = [self.transform(example, rng) for example, rng in zip(examples, draws, strict=True)]
        examples = self._at_one_stage([_without_crowds(example) for example in examples])
        named = [example for example in examples if example.get("caption") is None]
        everything = list(dict.fromkeys(name for example in named for name in example["names"]))
        prompts, annotations = [], []
        for example, rng in zip(examples, draws, strict=True):
            # Without a sample key the epoch is unknown, so an overflowing prompt takes a random group.
            turn = example["sample_key"][0] if example.get("sample_key") is not None else rng.randrange(2**30)
            prompt, items = self._ask(example, everything, rng, turn)
            prompts.append(prompt)
            annotations.append({"annotations": items})
        images = [example["image"] for example in examples]
        options = {"do_resize": False} if any(example.get("resized") for example in examples) else {}
        batch = dict(self.processor(images=images, text=prompts, annotations=annotations, **options))
        return {**batch, "text": [list(prompt.labels) for prompt in prompts]} if self.return_text else batch

    def _ask(
        self, example: dict[str, Any], everything: Sequence[str], rng: random.Random, turn: int
    ) -> tuple[Prompt, list[dict[str, Any]]]:
        """Return an image's prompt and its annotations in terms of that prompt."""
        if example.get("caption") is not None:
            return self._ask_caption(example, turn)
        names = example["names"]
        absent = example.get("neg_names")
        if isinstance(self.prompt_sampler, PromptSampler):
            text = self.prompt_sampler(names, rng, absent)
        elif self.prompt_sampler is not None:
            text = self.prompt_sampler(names, rng)
        else:
            text = self.labels if self.labels is not None else list(everything)
        # A name that occurs only as a crowd is neither a positive nor a negative, so the prompt leaves it out.
        unsure = {self._prompts.key(name) for name in example["crowd_names"]} - {self._prompts.key(n) for n in names}
        text = [label for label in text if self._prompts.key(label) not in unsure]
        if absent is not None and self.labels is None:
            # A name that is neither in the image nor known to be absent may be there without a box.
            sure = {self._prompts.key(name) for name in (*names, *absent)}
            text = [label for label in text if self._prompts.key(label) in sure]
        text = self._prompts.choose(text, names, rng, turn) or [_NO_NAME]
        place = {self._prompts.key(label): index for index, label in enumerate(text)}
        keys = [self._prompts.key(name) for name in names]
        items = [
            {"bbox": _xywh(box), "category_id": place[key]}
            for box, key in zip(example["boxes"], keys, strict=True)
            if key is not None and key in place
        ]
        return build_prompt(text, self.processor.tokenizer, self.processor.max_text_len), items

    def _ask_caption(self, example: dict[str, Any], turn: int) -> tuple[Prompt, list[dict[str, Any]]]:
        tokenizer, max_text_len = self.processor.tokenizer, self.processor.max_text_len
        caption, spans = fit_caption(example["caption"], list(example["spans"]), tokenizer, max_text_len, turn)
        try:
            prompt = build_caption(caption, tokenizer, max_text_len)
        except ValueError as error:
            logger.warning("A caption is left out with its boxes: %s.", reason(error))
            return build_prompt([_NO_NAME], tokenizer, max_text_len), []
        items = []
        for box, name, pairs in zip(example["boxes"], example["names"], spans, strict=True):
            # The caption was shortened and this phrase belongs to another epoch.
            if not pairs:
                continue
            try:
                phrase_tokens(prompt, pairs)
            except ValueError as error:
                logger.warning("The phrase %s is left out with its box: %s.", shorten(name), reason(error))
                continue
            items.append({"bbox": _xywh(box), "tokens_positive": pairs})
        return prompt, items

    def _check_names(self, row: Mapping[str, Any]) -> None:
        """Reject names outside the fixed labels, before a transform swaps "left" and "right" in them."""
        if row.get("caption") is not None:
            return
        if self._label_keys is None:
            self._label_keys = {self._prompts.key(label) for label in self.labels or ()}
        crowd = row.get("crowd") or [False] * len(row["names"])
        for name, is_crowd in zip(row["names"], crowd, strict=True):
            if not is_crowd and self._prompts.key(str(name)) not in self._label_keys:
                raise ValueError(f"The annotated name {shorten(name)} is not among the labels; add it to labels.")

    def _at_one_stage(self, examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Resize the remaining images to the processor's size if a transform resized only some of the batch."""
        if not any(example.get("resized") for example in examples):
            return examples
        usual = RandomChoiceResize([self.processor.image_processor.size])
        return [example if example.get("resized") else usual(example, random.Random(0)) for example in examples]

    def _own_random(self) -> random.Random:
        if self._rng is None:
            from torch.utils.data import get_worker_info

            worker = get_worker_info()
            self._rng = random.Random(self.seed if worker is None else f"{self.seed}-{worker.id}-{worker.seed}")
        return self._rng


def _without_crowds(example: Mapping[str, Any]) -> dict[str, Any]:
    """Drop crowd boxes and list their names as "crowd_names"; boxes become (N, 4) float64."""
    crowd = example.get("crowd")
    boxes = np.asarray(example["boxes"], dtype=np.float64).reshape(-1, 4)
    single = [index for index in range(len(boxes)) if crowd is None or not crowd[index]]
    kept: dict[str, Any] = {**example, "boxes": boxes[single], "names": [str(example["names"][i]) for i in single]}
    kept["crowd_names"] = [str(name) for index, name in enumerate(example["names"]) if index not in single]
    if example.get("spans") is not None:
        kept["spans"] = [example["spans"][index] for index in single]
    return kept


def _xywh(box: np.ndarray) -> list[float]:
    x1, y1, x2, y2 = box.tolist()
    return [x1, y1, x2 - x1, y2 - y1]
