"""Token scores of a model's outputs to scored boxes with labels, one prompt at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .box_ops import batched_nms, cxcywh_to_xyxy, nms
from .text_prompt import Prompt, parse_labels, spans_from_ids, special_token_ids


@dataclass(frozen=True)
class LabelledRow:
    """One row of logits: its image, and the labels of its prompt.

    Attributes:
        image: Index of the image.
        label_indices: Index of each label among the image's labels.
        spans: (start, end) tokens of each label.
    """

    image: int
    label_indices: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LabelledRows:
    """The rows of a batch of outputs.

    Attributes:
        labels: Labels of each image, negative labels last.
        num_positives: Number of labels of each image that may appear in results.
        rows: One per row of logits.
    """

    labels: Sequence[Sequence[str]]
    num_positives: list[int]
    rows: list[LabelledRow]


def rows_of_prompts(prompts: Sequence[Prompt]) -> LabelledRows:
    """Return the rows of outputs for prompts.

    Args:
        prompts: One prompt per image; each of its chunks is a row.

    Returns:
        The rows.
    """
    rows = [
        LabelledRow(image, chunk.label_indices, chunk.spans)
        for image, prompt in enumerate(prompts)
        for chunk in prompt.chunks
    ]
    return LabelledRows([prompt.labels for prompt in prompts], [prompt.num_positives for prompt in prompts], rows)


def rows_of_tokens(inputs: Any, num_rows: int, tokenizer: Any, text_labels: Any = None) -> LabelledRows:
    """Return the rows of outputs for tokens alone; labels are read from the tokens unless they are given.

    Args:
        inputs: input_ids (R, T), or a mapping with them and optionally image_indices (R,).
        num_rows: Number of rows of the outputs; a single prompt serves all of them.
        tokenizer: Tokenizer of the model's text encoder.
        text_labels: Labels as a list or text for all images, or one per image; None decodes the tokens.

    Returns:
        The rows. No label counts as negative, because tokens do not tell.

    Raises:
        ValueError: There are no tokens, or the numbers of labels differ.
    """
    is_mapping = isinstance(inputs, Mapping)
    ids = inputs.get("input_ids") if is_mapping else inputs
    if ids is None:
        raise ValueError("The prompt is missing; pass the inputs that this processor returned.")
    indices = inputs.get("image_indices") if is_mapping else None
    ids_list = torch.as_tensor(ids).tolist() * (num_rows if len(ids) == 1 else 1)
    images = list(range(len(ids_list))) if indices is None else torch.as_tensor(indices).tolist()
    special = special_token_ids(tokenizer)
    names: list[list[str]] = [[] for _ in range(max(images) + 1)]
    rows = []
    for image, row_ids in zip(images, ids_list, strict=True):
        real = [token for token in row_ids if token != tokenizer.pad_token_id]
        spans = spans_from_ids(real, special, len(real))
        first = len(names[image])
        names[image] += [tokenizer.decode(real[start:end]).strip() for start, end in spans]
        rows.append(LabelledRow(image, tuple(range(first, first + len(spans))), tuple(spans)))
    if text_labels is not None:
        shared = isinstance(text_labels, str) or all(isinstance(item, str) for item in text_labels)
        given = [parse_labels(item) for item in ([text_labels] * len(names) if shared else text_labels)]
        if [len(labels) for labels in given] != [len(labels) for labels in names]:
            raise ValueError(
                f"text_labels has {[len(labels) for labels in given]} labels per image but the prompts have "
                f"{[len(labels) for labels in names]}; give the labels of the prompts."
            )
        names = given
    return LabelledRows(names, [len(labels) for labels in names], rows)


def are_prompts_of(prompts: Sequence[Prompt], input_ids: Any) -> bool:
    """Return whether prompts have the given tokens; they differ if a batch was cut, joined or collated.

    Args:
        prompts: Prompts that came with a batch.
        input_ids: (R, T) tokens of the batch, as a tensor, array or list.

    Returns:
        Whether row i begins with the tokens of chunk i, for all rows and chunks.
    """
    rows = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
    chunks = [chunk for prompt in prompts for chunk in prompt.chunks]
    return len(rows) == len(chunks) and all(
        tuple(row[: len(chunk.input_ids)]) == chunk.input_ids for row, chunk in zip(rows, chunks, strict=True)
    )


@dataclass(frozen=True)
class Selection:
    """Which boxes and labels become results; see `GDinoProcessor.post_process_grounded_object_detection`.

    Attributes:
        threshold: Score that results must exceed, 0..1.
        text_threshold: Lowest score of a label's best token, 0..1.
        score: How the scores of a label's tokens are combined.
        multi_label: Whether a query may yield several labels.
        nms_threshold: IoU in 0..1 above which the lower-scoring of two boxes is dropped; None keeps both.
        class_agnostic_nms: Whether boxes of different labels also suppress each other.
        top_k: Largest number of results per image; None keeps all.
    """

    threshold: float
    text_threshold: float
    score: Literal["max", "mean"]
    multi_label: bool
    nms_threshold: float | None
    class_agnostic_nms: bool
    top_k: int | None

    def __post_init__(self) -> None:
        for name in ("threshold", "text_threshold", "nms_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be within 0..1, got {value}.")
        if self.score not in ("max", "mean"):
            raise ValueError(f"score must be 'max' or 'mean', got {self.score!r}.")

    def __call__(self, outputs: Any, labelled: LabelledRows, image: int, scale: Tensor | None) -> dict[str, Any]:
        """Select the results of one image, best first.

        Args:
            outputs: Model output with logits (R, Q, T) and pred_boxes (R, Q, 4).
            labelled: The labels of all rows.
            image: Index of the image.
            scale: (4,) factors from 0..1 to pixels; None leaves boxes in 0..1.

        Returns:
            "scores", "boxes", "text_labels" and "labels".
        """
        boxes = outputs.pred_boxes.float()
        parts = [
            self._of_row(outputs.logits[index], boxes[index], row, labelled.num_positives[image])
            for index, row in enumerate(labelled.rows)
            if row.image == image and row.spans
        ]
        empty = {"scores": boxes.new_empty(0), "labels": boxes.new_empty(0, dtype=torch.int64)}
        parts = parts or [{**empty, "boxes": boxes.new_empty(0, 4)}]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if scale is not None:
            found["boxes"] = found["boxes"] * scale
        if self.nms_threshold is not None:
            if self.class_agnostic_nms:
                keep = nms(found["boxes"], found["scores"], self.nms_threshold)
            else:
                keep = batched_nms(found["boxes"], found["scores"], found["labels"], self.nms_threshold)
            found = {name: value[keep] for name, value in found.items()}
        order = found["scores"].argsort(descending=True, stable=True)[: self.top_k]
        labels = found["labels"][order]
        return {
            "scores": found["scores"][order],
            "boxes": found["boxes"][order],
            "text_labels": [labelled.labels[image][index] for index in labels.tolist()],
            "labels": labels,
        }

    def _of_row(self, logits: Tensor, boxes: Tensor, row: LabelledRow, num_positives: int) -> dict[str, Tensor]:
        """Select the passing queries and labels of one prompt, from (Q, T) logits and (Q, 4) boxes."""
        probabilities = logits.float().sigmoid()
        # One column per label of this prompt only, so that memory does not grow with the number of labels.
        peaks = torch.stack([probabilities[:, start:end].amax(-1) for start, end in row.spans], dim=-1)
        scores = peaks
        if self.score == "mean":
            scores = torch.stack([probabilities[:, start:end].mean(-1) for start, end in row.spans], dim=-1)
        labels = torch.tensor(row.label_indices, device=logits.device)
        if self.multi_label:
            passed = (scores > self.threshold) & (peaks >= self.text_threshold) & (labels < num_positives)
            query, column = passed.nonzero(as_tuple=True)
        else:
            best, winner = scores.max(-1)
            peak = peaks.gather(-1, winner[:, None])[:, 0]
            passed = (best > self.threshold) & (peak >= self.text_threshold) & (labels[winner] < num_positives)
            query = passed.nonzero()[:, 0]
            column = winner[query]
        return {
            "scores": scores[query, column],
            "labels": labels[column],
            "boxes": cxcywh_to_xyxy(boxes[query]),
        }
