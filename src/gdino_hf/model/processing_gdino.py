"""The processor: images and labels to model inputs, and model outputs to boxes with the caller's labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import TextKwargs

from .box_ops import batched_nms, cxcywh_to_xyxy, nms
from .caption_prompt import phrase_tokens
from .image_processing_gdino import GDinoImageProcessor, as_list, box_scale, category_id, check_options
from .text_prompt import Prompt, build_prompt, name_key, parse_labels, spans_from_ids, special_token_ids

# Tokenizer options that Hugging Face code passes along; accepted and ignored.
_TOKENIZER_OPTIONS = frozenset(TextKwargs.__annotations__) - {"return_tensors"}


class GDinoInputs(BatchFeature):
    """Arguments of the model's forward, with the prompts and sizes that post-processing needs as attributes.

    Attributes:
        prompts: Labels and tokens of each image.
        original_sizes: (height, width) in pixels of each upright photograph: the target_sizes of its boxes.
    """

    prompts: list[Prompt] | None = None
    original_sizes: list[tuple[int, int]] | None = None

    def to(self, *args: Any, **kwargs: Any) -> "GDinoInputs":
        """Move tensors to a device or dtype, keeping the attributes."""
        moved = super().to(*args, **kwargs)
        moved.prompts, moved.original_sizes = self.prompts, self.original_sizes
        return moved

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "prompts": self.prompts, "original_sizes": self.original_sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prompts, self.original_sizes = state.get("prompts"), state.get("original_sizes")


@dataclass(frozen=True)
class _Phrases:
    """Labels of one row of logits: their indices among the image's labels, and their (start, end) tokens."""

    label_indices: list[int]
    spans: list[tuple[int, int]]


class GDinoProcessor(ProcessorMixin):
    """Image processor and tokenizer in one; takes labels as lists or text and returns them with the results.

    Args:
        image_processor: A GDinoImageProcessor. One of another class, which Hub checkpoints may name, is replaced by a
            GDinoImageProcessor with its settings.
        tokenizer: Tokenizer of the text encoder.
        max_text_len: Largest number of tokens in a prompt; labels beyond it go into further prompts for the same image.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, max_text_len: int = 256, **kwargs: Any):
        self.max_text_len = max_text_len
        if image_processor is not None and not isinstance(image_processor, GDinoImageProcessor):
            image_processor = GDinoImageProcessor.from_dict(image_processor.to_dict())
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | Sequence[Sequence[str] | Prompt] | None = None,
        annotations: Any = None,
        negative_labels: str | Sequence[str] | None = None,
        categories: Mapping[int, str] | Sequence[Mapping[str, Any]] | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> GDinoInputs:
        """Prepare images, labels and annotations for the model.

        Args:
            images: One image or a list; see `GDinoImageProcessor.preprocess`. None prepares text alone.
            text: Labels for all images, as a list (["cat", "remote control"]) or as text that `split_labels` splits
                ("a cat. a remote control."); or one list or text per image ([["cat"], ["dog", "hat"]]). A flat list of
                strings that all end in a period, as many as there are images, is one text per image
                (["a cat. a dog.", "a hat."]). An image's entry may also be a prompt from `build_prompt` or
                `build_caption`. None prepares images only.
            annotations: COCO annotations of each image ({"annotations": [{"bbox", "category_id", ...}]}); they become
                `labels`. If the image's text is from `build_caption`, an annotation has "tokens_positive" instead of a
                class: one or more pairs of [start, end) characters of its phrase.
            negative_labels: Labels that compete for every box but are left out of results, as a list or text; every
                prompt has them.
            categories: Names of the category ids: COCO's list of {"id", "name"}, or {id: name}; the names must be among
                the image's labels. By default, category_id is an index into the image's labels. An annotation's own
                "label" or "category" name takes precedence over both.
            return_tensors: "pt" or None; both give torch tensors.
            **kwargs: Options of the image processor, also as `images_kwargs`. Options of tokenizers (padding and so on)
                are accepted without effect: prompts are padded to the longest and never cut.

        Returns:
            pixel_values (B, 3, H, W), pixel_mask (B, H, W), image_sizes (B pairs of height and width); input_ids,
            attention_mask and token_type_ids (R, T) for R prompts; image_indices (R,) if an image needs several
            prompts; and labels (B dicts) if there are annotations. Pass the whole object to
            `post_process_grounded_object_detection`, which needs its attribute `prompts`.

        Raises:
            TypeError: text or an image has another type, or an option is unknown.
            ValueError: A label or an image cannot be used, or the numbers of images and texts differ.
        """
        if images is None and text is None:
            raise ValueError("There is nothing to prepare; give images, text or both.")
        options = _image_options(kwargs)
        return_tensors = options.pop("return_tensors", return_tensors)
        check_options(options)
        data: dict[str, Any] = {}
        num_images, original_sizes = None, None
        if images is not None:
            features = self.image_processor(as_list(images), return_tensors=return_tensors, **options)
            data.update(pixel_values=features["pixel_values"], pixel_mask=features["pixel_mask"])
            num_images = features["pixel_values"].shape[0]
            # With these sizes, the model need not derive them from the mask, and a batch equals single images.
            data["image_sizes"] = features.image_sizes
            original_sizes = features.original_sizes
        prompts = None
        if text is not None:
            prompts = self._prompts(text, num_images, negative_labels or ())
            data.update(self._tokens(prompts))
        if annotations is not None:
            if original_sizes is None or prompts is None:
                raise ValueError(
                    "annotations need images and text, because boxes are relative to images and classes index labels."
                )
            data["labels"] = self._labels(annotations, original_sizes, prompts, categories)
        inputs = GDinoInputs(data)
        inputs.prompts, inputs.original_sizes = prompts, original_sizes
        return inputs

    def _prompts(self, text: Any, num_images: int | None, negative_labels: str | Sequence[str]) -> list[Prompt]:
        """Build one prompt per image, or per entry of text if there are no images."""
        for item in (text, *(text if isinstance(text, (list, tuple)) else ())):
            if not isinstance(item, (Sequence, Prompt)) or isinstance(item, bytes):
                raise TypeError(f"Labels must be a string or a list of strings, got {item!r}.")
        text = [text] if isinstance(text, Prompt) else text
        per_image = not isinstance(text, str) and any(not isinstance(item, str) for item in text)
        # Other processors take a list of strings, one per image, each closed by a period.
        captions = (
            not isinstance(text, str)
            and not per_image
            and len(text) > 0
            and all(item.strip().endswith(".") for item in text)
            and (num_images is None or num_images == len(text))
        )
        entries = [text] if not (per_image or captions) else list(text)
        count = num_images if num_images is not None else len(entries)
        if len(entries) not in (1, count):
            raise ValueError(f"There are labels for {len(entries)} images but {count} images; give one list each.")
        built = [
            entry
            if isinstance(entry, Prompt)
            else build_prompt(entry, self.tokenizer, self.max_text_len, negative_labels)
            for entry in entries
        ]
        return built * count if len(built) == 1 else built

    def _tokens(self, prompts: list[Prompt]) -> dict[str, Tensor]:
        rows = [(image, chunk) for image, prompt in enumerate(prompts) for chunk in prompt.chunks]
        longest = max(len(chunk.input_ids) for _, chunk in rows)
        pad = self.tokenizer.pad_token_id or 0
        input_ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
        attention_mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for row, (_, chunk) in enumerate(rows):
            input_ids[row, : len(chunk.input_ids)] = torch.tensor(chunk.input_ids)
            attention_mask[row, : len(chunk.input_ids)] = 1
        tokens = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": torch.zeros_like(input_ids),
        }
        if len(rows) > len(prompts):
            tokens["image_indices"] = torch.tensor([image for image, _ in rows])
        return tokens

    def _labels(
        self, annotations: Any, sizes: list[tuple[int, int]], prompts: list[Prompt], categories: Any
    ) -> list[dict[str, Tensor]]:
        annotations = [annotations] if isinstance(annotations, Mapping) else list(annotations)
        if len(annotations) != len(sizes):
            raise ValueError(f"There are {len(annotations)} annotations for {len(sizes)} images; give one each.")
        names = _category_names(categories)
        labels = []
        for annotation, size, prompt in zip(annotations, sizes, prompts, strict=True):
            if not isinstance(annotation, Mapping) or "annotations" not in annotation:
                raise ValueError("An annotation must be a dict with the list 'annotations', as COCO has it.")
            items = [item for item in annotation["annotations"] if not item.get("iscrowd", 0)]
            named = _named(items, names, prompt)
            # Boxes without area are dropped; numbering the boxes first shows which ones are left.
            numbered = [{**item, "category_id": number} for number, item in enumerate(items)]
            label = self.image_processor.boxes_from_coco({"annotations": numbered}, size)
            kept = label["class_labels"].tolist()
            label["class_labels"] = torch.tensor([named[number][0] for number in kept], dtype=torch.int64)
            if prompt.offsets is not None:
                label["positive_map"] = torch.zeros(len(kept), len(prompt.offsets), dtype=torch.bool)
                for row, number in enumerate(kept):
                    label["positive_map"][row, named[number][1]] = True
            labels.append(label)
        return labels

    def post_process_grounded_object_detection(
        self,
        outputs: Any,
        inputs: Any = None,
        threshold: float = 0.3,
        text_threshold: float = 0.25,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        nms_threshold: float | None = None,
        class_agnostic_nms: bool = False,
        score: Literal["max", "mean"] = "max",
        multi_label: bool = False,
        top_k: int | None = None,
        text_labels: Sequence[str] | Sequence[Sequence[str]] | None = None,
        input_ids: Tensor | None = None,
    ) -> list[dict[str, Any]]:
        """Turn model outputs into boxes with labels.

        A label's score for a query is the highest (or mean) sigmoid of its tokens, and the query gets the label with
        the highest score. If that is a negative label, the query is left out. Labels compete inside one prompt only: if
        an image's labels take several prompts, one object may get a box from each ("cat" from one, "pet" from another),
        as in evaluations with thousands of labels. `class_agnostic_nms` with an `nms_threshold` keeps the best of them.

        Args:
            outputs: Model output with logits (R, Q, max_text_len) and pred_boxes (R, Q, 4).
            inputs: The object this processor returned, a mapping with input_ids, or input_ids (R, T) (default: the
                input_ids of the model output).
            threshold: Score that results must exceed, 0..1.
            text_threshold: Lowest score of a label's best token, 0..1.
            target_sizes: (height, width) of each image in pixels; None leaves boxes in 0..1.
            nms_threshold: IoU in 0..1 above which the lower-scoring of two boxes of one label is dropped; None keeps
                both.
            class_agnostic_nms: Whether boxes of different labels also suppress each other.
            score: How the scores of a label's tokens are combined: "max", or "mean" as in COCO evaluations.
            multi_label: Whether a query may yield several labels, each with its own score.
            top_k: Largest number of results per image; None keeps all.
            text_labels: Labels of inputs that this processor did not make, as a list or text for all images, or one per
                image.
            input_ids: Another name for `inputs`, as in transformers.

        Returns:
            For each image, best first: "scores" (N,), "labels" (N,) int64 index into the given labels, "text_labels"
            N strings, and "boxes" (N, 4) float32 xyxy.

        Raises:
            ValueError: A threshold is outside 0..1, or the numbers of prompts, labels or images differ.
        """
        for name, value in (
            ("threshold", threshold),
            ("text_threshold", text_threshold),
            ("nms_threshold", nms_threshold),
        ):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be within 0..1, got {value}.")
        if score not in ("max", "mean"):
            raise ValueError(f"score must be 'max' or 'mean', got {score!r}.")
        inputs = input_ids if inputs is None else inputs
        labels, num_positives, rows = self._rows(outputs, inputs, text_labels)
        logits, pred_boxes = outputs.logits, outputs.pred_boxes.float()
        if len(rows) != logits.shape[0]:
            raise ValueError(f"The inputs have {len(rows)} prompts but the outputs {logits.shape[0]}; pass the pair.")
        scale = None
        if target_sizes is not None:
            scale = box_scale(target_sizes, pred_boxes.new_empty(len(labels), 0, 4))
        results = []
        for image, names in enumerate(labels):
            scores, tokens, boxes = [], [], []
            for row, (owner, phrases) in enumerate(rows):
                if owner != image:
                    continue
                probabilities = logits[row].float().sigmoid()
                best = torch.full((logits.shape[1], len(names)), -1.0, device=logits.device)
                peak = best.clone()
                for label, (start, end) in zip(phrases.label_indices, phrases.spans, strict=True):
                    span = probabilities[:, start:end]
                    peak[:, label] = span.amax(-1)
                    best[:, label] = peak[:, label] if score == "max" else span.mean(-1)
                scores.append(best)
                tokens.append(peak)
                boxes.append(cxcywh_to_xyxy(pred_boxes[row]))
            found = _select(
                torch.cat(scores),
                torch.cat(tokens),
                torch.cat(boxes),
                num_positives=num_positives[image],
                threshold=threshold,
                text_threshold=text_threshold,
                multi_label=multi_label,
            )
            if scale is not None:
                found["boxes"] = found["boxes"] * scale[image]
            if nms_threshold is not None:
                classes = found["labels"]
                keep = (
                    nms(found["boxes"], found["scores"], nms_threshold)
                    if class_agnostic_nms
                    else batched_nms(found["boxes"], found["scores"], classes, nms_threshold)
                )
                found = {name: value[keep] for name, value in found.items()}
            order = found["scores"].argsort(descending=True, stable=True)[:top_k]
            result: dict[str, Any] = {name: value[order] for name, value in found.items()}
            result["text_labels"] = [names[index] for index in result["labels"].tolist()]
            results.append(result)
        return results

    def _rows(
        self, outputs: Any, inputs: Any, text_labels: Any
    ) -> tuple[Sequence[Sequence[str]], list[int], list[tuple[int, _Phrases]]]:
        """Return each image's labels and number of positive labels, and (image, phrases) of every row of logits."""
        prompts, num_rows = getattr(inputs, "prompts", None), outputs.logits.shape[0]
        if prompts is not None:
            if len(prompts) == 1 and len(prompts[0].chunks) == 1:
                # The text was prepared once for many images.
                prompts = prompts * num_rows
            rows = [
                (image, _Phrases(list(chunk.label_indices), list(chunk.spans)))
                for image, prompt in enumerate(prompts)
                for chunk in prompt.chunks
            ]
            return [prompt.labels for prompt in prompts], [prompt.num_positives for prompt in prompts], rows
        if inputs is None:
            inputs = getattr(outputs, "input_ids", None)
        is_mapping = isinstance(inputs, Mapping)
        ids = inputs.get("input_ids") if is_mapping else inputs
        if ids is None:
            raise ValueError("The prompt is missing; pass the inputs that this processor returned.")
        indices = inputs.get("image_indices") if is_mapping else None
        ids_list = ids.tolist() * (num_rows if len(ids) == 1 else 1)
        images = list(range(len(ids_list))) if indices is None else indices.tolist()
        special = special_token_ids(self.tokenizer)
        names: list[list[str]] = [[] for _ in range(max(images) + 1)]
        rows = []
        for image, row_ids in zip(images, ids_list, strict=True):
            real = [token for token in row_ids if token != self.tokenizer.pad_token_id]
            spans = spans_from_ids(real, special, len(real))
            first = len(names[image])
            names[image] += [self.tokenizer.decode(real[start:end]).strip() for start, end in spans]
            rows.append((image, _Phrases(list(range(first, first + len(spans))), spans)))
        if text_labels is not None:
            shared = isinstance(text_labels, str) or all(isinstance(item, str) for item in text_labels)
            given = [parse_labels(item) for item in ([text_labels] * len(names) if shared else text_labels)]
            if [len(labels) for labels in given] != [len(labels) for labels in names]:
                raise ValueError(
                    f"text_labels has {[len(labels) for labels in given]} labels per image but the prompts have "
                    f"{[len(labels) for labels in names]}; give the labels of the prompts."
                )
            names = given
        return names, [len(labels) for labels in names], rows


def _select(
    scores: Tensor,
    peaks: Tensor,
    boxes: Tensor,
    *,
    num_positives: int,
    threshold: float,
    text_threshold: float,
    multi_label: bool,
) -> dict[str, Tensor]:
    """Select the passing queries and labels from (Q, N) scores and best tokens, -1 where a row lacks the label."""
    if multi_label:
        passed = (scores > threshold) & (peaks >= text_threshold)
        passed[:, num_positives:] = False
        query, label = passed.nonzero(as_tuple=True)
    else:
        best, winner = scores.max(-1)
        peak = peaks.gather(-1, winner[:, None])[:, 0]
        query = ((best > threshold) & (peak >= text_threshold) & (winner < num_positives)).nonzero()[:, 0]
        label = winner[query]
    return {"scores": scores[query, label], "labels": label, "boxes": boxes[query]}


def _image_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the image options, given flat or grouped by kind as in other processors; they are checked when used."""
    groups = ("common_kwargs", "images_kwargs", "text_kwargs")
    flat = {name: value for name, value in kwargs.items() if name not in groups}
    for group in groups[:2]:
        flat |= dict(kwargs.get(group) or {})
    return {name: value for name, value in flat.items() if name not in _TOKENIZER_OPTIONS}


def _category_names(categories: Any) -> dict[int, str] | None:
    if categories is None:
        return None
    if isinstance(categories, Mapping):
        return {int(number): str(name) for number, name in categories.items()}
    return {int(category["id"]): str(category["name"]) for category in categories}


def _named(
    items: Sequence[Mapping[str, Any]], names: dict[int, str] | None, prompt: Prompt
) -> list[tuple[int, list[int]]]:
    """Return the index of each annotation's label and, for a caption, the tokens of its phrase."""
    if prompt.offsets is not None:
        return [phrase_tokens(prompt, item.get("tokens_positive") or ()) for item in items]
    if any("tokens_positive" in item for item in items):
        raise ValueError("tokens_positive are characters of a caption; give build_caption(text, ...) as the text.")
    positives = prompt.labels[: prompt.num_positives]
    place = {name_key(label): index for index, label in reversed(list(enumerate(positives)))}
    return [(_class_index(item, names, place, prompt), []) for item in items]


def _class_index(item: Mapping[str, Any], names: dict[int, str] | None, place: dict[str, int], prompt: Prompt) -> int:
    """Return the index of an annotation's label among the image's labels."""
    name = item.get("label", item.get("category"))
    if not isinstance(name, str):
        if "category_id" not in item:
            raise ValueError("An annotation has neither category_id nor label; name its class.")
        number = category_id(item)
        if names is None:
            if not 0 <= number < prompt.num_positives:
                raise ValueError(
                    f"category_id {number} is not an index of the image's {prompt.num_positives} labels; pass "
                    "categories= with the names of the ids."
                )
            return number
        if number not in names:
            raise ValueError(f"category_id {number} is not among the categories given; add it.")
        name = names[number]
    if name_key(name) not in place:
        if name_key(name) in map(name_key, prompt.labels):
            raise ValueError(f"The annotated class {name!r} is a negative label of the image; move it to text.")
        raise ValueError(f"The annotated class {name!r} is not among the image's labels; add it to text.")
    return place[name_key(name)]
