"""The processor: images and labels to model inputs, and model outputs to boxes with the caller's labels."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from .box_ops import box_scale, check_outputs
from .coco_labels import category_names, label_of_prompt
from .grounded_results import (
    LabelledRows,
    Selection,
    are_prompts_of,
    rows_of_prompts,
    rows_of_tokens,
)
from .image_processing_gdino import GDinoImageProcessor, as_list, check_options
from .label_faults import warn_of_labels
from .load_errors import plain_load_errors
from .pixel_layouts import checked_device, converted, moved
from .processor_options import PromptLayout, call_options
from .selection_options import check_score
from .text_prompt import Prompt, as_sequence, build_prompt, check_prompt_length, shorten

_THRESHOLD = 0.3


class GDinoInputs(BatchFeature):
    """Arguments of the model's forward, with the prompts and sizes that post-processing needs as attributes.

    Every value is a tensor with one row per image or prompt, except `labels`, a list of dicts of tensors. Functions
    that build a new mapping from the tensors (accelerate's, for instance) lose the attributes, and those that change
    the tensors of a copy leave old ones behind: post-processing then reads labels from `input_ids`.

    Attributes:
        prompts: Labels and tokens of each image; None if the object was made from tensors.
        original_sizes: (height, width) in pixels of each upright photograph: the target_sizes of its boxes.
    """

    prompts: list[Prompt] | None = None
    original_sizes: list[tuple[int, int]] | None = None

    def to(self, *args: Any, **kwargs: Any) -> "GDinoInputs":
        """Move tensors to a device or dtype, keeping the attributes; labels change their device only."""
        target = super().to(*args, **kwargs)
        target.prompts, target.original_sizes = self.prompts, self.original_sizes
        device = kwargs.get("device", args[0] if args and not isinstance(args[0], torch.dtype) else None)
        if "labels" in target.data:
            target.data["labels"] = moved(target.data["labels"], device)
        return target

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "prompts": self.prompts, "original_sizes": self.original_sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prompts, self.original_sizes = state.get("prompts"), state.get("original_sizes")


class GDinoProcessor(ProcessorMixin):
    """Image processor and tokenizer in one; takes labels as lists or text and returns them with the results.

    Args:
        image_processor: A GDinoImageProcessor. One of another class, which Hub checkpoints may name, is replaced by a
            GDinoImageProcessor with its settings.
        tokenizer: Tokenizer of the text encoder.
        max_text_len: Largest number of tokens in a prompt; labels beyond it go into further prompts for the same image.
        nms_threshold: IoU in 0..1 above which the lower-scoring of two boxes of one label is dropped unless a call says
            otherwise, for models that find one object several times; None keeps both.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        max_text_len: int = 256,
        nms_threshold: float | None = None,
        **kwargs: Any,
    ):
        self.max_text_len = max_text_len
        if nms_threshold is not None:
            check_score(nms_threshold, "nms_threshold")
        self.nms_threshold = nms_threshold
        if image_processor is not None and not isinstance(image_processor, GDinoImageProcessor):
            image_processor = GDinoImageProcessor.from_dict(image_processor.to_dict())
        super().__init__(image_processor, tokenizer, **kwargs)
        check_prompt_length(max_text_len)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load image processor and tokenizer as transformers does; damaged files raise a ValueError with the cause."""
        with plain_load_errors(str(pretrained_model_name_or_path)):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | Sequence[Sequence[str] | Prompt] | None = None,
        annotations: Any = None,
        negative_labels: str | Sequence[str] | None = None,
        categories: Mapping[int, str] | Sequence[Mapping[str, Any]] | None = None,
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
            **kwargs: Options, flat or grouped as images_kwargs and text_kwargs. Those of the image processor, see
                `GDinoImageProcessor.preprocess`; `return_tensors`, "pt" (the default), "np", or None for lists; and
                those of tokenizers that prompts can follow: `padding` (True, the default; "max_length" pads to
                `max_length` or max_text_len; False), `pad_to_multiple_of`, `return_token_type_ids`,
                `return_attention_mask`. Labels are never cut: `truncation` with a `max_length` that would cut is
                refused.

        Returns:
            pixel_values (B, 3, H, W), pixel_mask (B, H, W), image_sizes (B, 2) int64 pairs of height and width;
            input_ids, attention_mask and token_type_ids (R, T) for R prompts; image_indices (R,) if an image needs
            several prompts; and labels (B dicts, see `labels_from_coco`) if there are annotations. Pass the whole
            object to `post_process_grounded_object_detection`, which needs its attribute `prompts`.

        Raises:
            TypeError: text or an image has another type, or an option is unknown.
            ValueError: A label, an image or an option cannot be used, or the numbers of images and texts differ.

        Labels that the tokenizer cannot tell apart or does not know in full are named in a `LabelWarning`.
        """
        if images is None and text is None:
            raise ValueError("There is nothing to prepare; give images, text or both.")
        options = call_options(kwargs, self.tokenizer)
        check_options(options.images)
        device = checked_device(options.images.get("device"), options.return_tensors)
        data: dict[str, Any] = {}
        num_images, original_sizes = None, None
        if images is not None:
            features = self.image_processor(as_list(images), return_tensors=options.return_tensors, **options.images)
            data.update(features)
            num_images = len(features["image_sizes"])
            original_sizes = features.original_sizes
        prompts = None
        if text is not None:
            prompts = self._prompts(text, num_images, negative_labels or ())
            data.update(moved(self._tokens(prompts, options.layout, options.return_tensors), device))
        if annotations is not None:
            if original_sizes is None or prompts is None:
                raise ValueError(
                    "annotations need images and text, because boxes are relative to images and classes index labels."
                )
            sizes = [tuple(size) for size in torch.as_tensor(data["image_sizes"]).tolist()]
            converts = self._option("do_convert_annotations", options.images)
            relative = converts is None or bool(converts)
            labels = self._labels(annotations, original_sizes, sizes, prompts, categories, relative)
            data["labels"] = moved(converted(labels, options.return_tensors), device)
        inputs = GDinoInputs(data)
        inputs.prompts, inputs.original_sizes = prompts, original_sizes
        return inputs

    def _option(self, name: str, given: Mapping[str, Any]) -> Any:
        """Return an option of a call, or the image processor's own."""
        return given[name] if given.get(name) is not None else getattr(self.image_processor, name, None)

    def _prompts(self, text: Any, num_images: int | None, negative_labels: str | Sequence[str]) -> list[Prompt]:
        """Build one prompt per image, or per entry of text if there are no images."""
        text = as_sequence(text)
        for item in (text, *(text if isinstance(text, (list, tuple)) else ())):
            if not isinstance(item, (Sequence, Prompt)) or isinstance(item, bytes):
                raise TypeError(f"Labels must be a string or a list of strings, got {shorten(item)}.")
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
        for entry, prompt in zip(entries, built, strict=True):
            if not isinstance(entry, Prompt):
                warn_of_labels(prompt, self.tokenizer, stacklevel=3)
        return built * count if len(built) == 1 else built

    def _tokens(self, prompts: list[Prompt], layout: PromptLayout, kind: str | None) -> dict[str, Any]:
        rows = [(image, chunk) for image, prompt in enumerate(prompts) for chunk in prompt.chunks]
        lengths = [len(chunk.input_ids) for _, chunk in rows]
        padded = layout.padded_length(lengths, self.max_text_len)
        is_ragged = layout.padding == "do_not_pad" and len(set(lengths)) > 1
        if is_ragged and kind is not None:
            raise ValueError(f"Prompts of {sorted(set(lengths))} tokens do not stack; set padding=True.")
        if not layout.mask and min(lengths) < padded and not is_ragged:
            raise ValueError(
                "Without attention_mask, the model would read padding as words; leave return_attention_mask out."
            )
        pad = self.tokenizer.pad_token_id or 0
        input_ids = torch.full((len(rows), padded), pad, dtype=torch.int64)
        attention_mask = torch.zeros(len(rows), padded, dtype=torch.int64)
        for row, (_, chunk) in enumerate(rows):
            input_ids[row, : len(chunk.input_ids)] = torch.tensor(chunk.input_ids)
            attention_mask[row, : len(chunk.input_ids)] = 1
        tokens = {"input_ids": input_ids}
        if layout.mask:
            tokens["attention_mask"] = attention_mask
        if layout.token_types:
            tokens["token_type_ids"] = torch.zeros_like(input_ids)
        found: dict[str, Any] = converted(tokens, kind)
        if is_ragged:
            found = {name: [row[:n] for row, n in zip(value, lengths, strict=True)] for name, value in found.items()}
        if len(rows) > len(prompts):
            found["image_indices"] = converted(torch.tensor([image for image, _ in rows]), kind)
        return found

    def _labels(
        self,
        annotations: Any,
        original_sizes: list[tuple[int, int]],
        sizes: list[tuple[int, int]],
        prompts: list[Prompt],
        categories: Any,
        relative: bool,
    ) -> list[dict[str, Tensor]]:
        annotations = [annotations] if isinstance(annotations, Mapping) else list(annotations)
        if len(annotations) != len(sizes):
            raise ValueError(f"There are {len(annotations)} annotations for {len(sizes)} images; give one each.")
        names = category_names(categories)
        return [
            label_of_prompt(annotation, original, size, prompt, names, relative=relative)
            for annotation, original, size, prompt in zip(annotations, original_sizes, sizes, prompts, strict=True)
        ]

    def post_process_grounded_object_detection(
        self,
        outputs: Any,
        inputs: Any = None,
        threshold: float | None = None,
        text_threshold: float = 0.25,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        nms_threshold: float | None = None,
        class_agnostic_nms: bool = False,
        score: Literal["max", "mean"] = "max",
        multi_label: bool = False,
        top_k: int | None = None,
        text_labels: Sequence[str] | Sequence[Sequence[str]] | None = None,
        input_ids: Tensor | None = None,
        box_threshold: float | None = None,
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
            threshold: Score that results must exceed, 0..1; None for 0.3.
            text_threshold: Lowest score of a label's best token, 0..1.
            target_sizes: (height, width) of each image in pixels; None leaves boxes in 0..1.
            nms_threshold: IoU in 0..1 above which the lower-scoring of two boxes of one label is dropped; 1 keeps both,
                None stands for the processor's own value.
            class_agnostic_nms: Whether boxes of different labels also suppress each other.
            score: How the scores of a label's tokens are combined: "max", or "mean" as in COCO evaluations.
            multi_label: Whether a query may yield several labels, each with its own score.
            top_k: Largest number of results per image; None keeps all.
            text_labels: Labels of inputs that this processor did not make, as a list or text for all images, or one per
                image.
            input_ids: Another name for `inputs`, as in transformers.
            box_threshold: Deprecated name of `threshold`.

        Returns:
            For each image, best first: "scores" (N,), "boxes" (N, 4) float32 xyxy, "text_labels" N strings, and
            "labels" (N,) int64 index into the given labels.

        Raises:
            ValueError: A threshold is outside 0..1, or the numbers of prompts, labels or images differ.
        """
        if box_threshold is not None:
            if threshold is not None and threshold != box_threshold:
                raise ValueError(f"threshold {threshold} and box_threshold {box_threshold} differ; give one.")
            warnings.warn("box_threshold is now called threshold; use that name.", FutureWarning, stacklevel=2)
            threshold = box_threshold
        select = Selection(
            _THRESHOLD if threshold is None else threshold,
            text_threshold,
            score,
            multi_label,
            self.nms_threshold if nms_threshold is None else nms_threshold,
            class_agnostic_nms,
            top_k,
        )
        check_outputs(outputs)
        num_rows = outputs.logits.shape[0]
        labelled = self._rows(outputs, input_ids if inputs is None else inputs, text_labels)
        if len(labelled.rows) != num_rows:
            raise ValueError(f"The inputs have {len(labelled.rows)} prompts but the outputs {num_rows}; pass the pair.")
        num_images = len(labelled.labels)
        scale: Sequence[Tensor | None] = [None] * num_images
        if target_sizes is not None:
            scale = list(box_scale(target_sizes, outputs.pred_boxes.new_empty(num_images, 0, 4)))
        return [select(outputs, labelled, image, scale[image]) for image in range(num_images)]

    def _rows(self, outputs: Any, inputs: Any, text_labels: Any) -> LabelledRows:
        """Return the labels of every row of logits, from prompts or else from tokens."""
        prompts, num_rows = getattr(inputs, "prompts", None), outputs.logits.shape[0]
        input_ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        if prompts is not None and (input_ids is None or are_prompts_of(prompts, input_ids)):
            if len(prompts) == 1 and len(prompts[0].chunks) == 1:
                # The text was prepared once for many images.
                prompts = prompts * num_rows
            return rows_of_prompts(prompts)
        inputs = getattr(outputs, "input_ids", None) if inputs is None else inputs
        return rows_of_tokens(inputs, num_rows, self.tokenizer, text_labels)
