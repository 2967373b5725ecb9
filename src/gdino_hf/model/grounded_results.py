"""Token scores of a model's outputs to scored boxes with labels, one prompt at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .box_ops import batched_nms, cxcywh_to_xyxy, nms
from .selection_options import SelectionOptions
from .text_prompt import Prompt, parse_labels, spans_from_ids, special_token_ids


@dataclass(frozen=True)
class LabelledRow:
    """One row of logits: its image, and the labels of its prompt.

    Attributes:
        image: Index of the image.
        label_indices: Index among the image's labels of the label of each phrase; a label may have several phrases.
        spans: (start, end) tokens of each phrase.
    """

    image: int
    label_indices: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ScoredRow:
    """Scores of the labels of one prompt.

    Attributes:
        labels: (N,) int64 index of each of the prompt's labels among the image's labels.
        scores: (Q, N) score of each label for each query, 0..1.
        peaks: (Q, N) score of each label's best token.
    """

    labels: Tensor
    scores: Tensor
    peaks: Tensor


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
class Selection(SelectionOptions):
    """Which boxes and labels become results; see `GDinoProcessor.post_process_grounded_object_detection`.

    This is the one place that turns token scores into label scores and label scores into results.

    The attributes are those of `SelectionOptions`.
    """

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
        parts = [
            self.select(
                self.scored(outputs.logits[index], row), outputs.pred_boxes[index], labelled.num_positives[image]
            )
            for index, row in enumerate(labelled.rows)
            if row.image == image and row.spans
        ]
        found = self.merged(parts, labelled.labels[image], scale, outputs.pred_boxes)
        del found["queries"]
        return found

    def scored(self, logits: Tensor, row: LabelledRow) -> ScoredRow:
        """Compute the scores of one prompt's labels.

        Args:
            logits: (Q, T) token logits.
            row: The labels of the prompt.

        Returns:
            The score of each of its labels for each query.
        """
        probabilities = logits.float().sigmoid()
        # One column per phrase of this prompt only, so that memory does not grow with the number of labels.
        peaks = torch.stack([probabilities[:, start:end].amax(-1) for start, end in row.spans], dim=-1)
        scores = peaks
        if self.score == "mean":
            scores = torch.stack([probabilities[:, start:end].mean(-1) for start, end in row.spans], dim=-1)
        owners = torch.tensor(row.label_indices, device=logits.device)
        labels, phrases = list(dict.fromkeys(row.label_indices)), row.label_indices
        if len(labels) < len(phrases):
            columns = [[place for place, owner in enumerate(phrases) if owner == label] for label in labels]
            peaks = torch.stack([peaks[:, of_one].amax(-1) for of_one in columns], dim=-1)
            together = torch.mean if self.phrases == "mean" else torch.amax
            scores = torch.stack([together(scores[:, of_one], -1) for of_one in columns], dim=-1)
            owners = torch.tensor(labels, device=logits.device)
        return ScoredRow(owners, scores, peaks)

    def select(self, found: ScoredRow, boxes: Tensor, num_positives: int) -> dict[str, Tensor]:
        """Select the queries and labels of one prompt that pass.

        A query gets the label with the highest score among the labels that pass their threshold, unless a negative
        label has a higher one.

        Args:
            found: The scores of the prompt's labels.
            boxes: (Q, 4) cxcywh in [0, 1].
            num_positives: Number of labels that may appear in results.

        Returns:
            "scores", "labels", "boxes" (xyxy in [0, 1]) and "queries" (the query's index) of the results.
        """
        labels, scores, peaks = found.labels, found.scores, found.peaks
        positive = labels < num_positives
        threshold: Any = self.threshold
        if isinstance(threshold, Tensor):
            threshold = threshold.to(scores.device)[labels.clamp(max=num_positives - 1)]
        passed = (scores > threshold) & positive
        if self.multi_label:
            query, column = (passed & (peaks >= self.text_threshold)).nonzero(as_tuple=True)
        else:
            best, winner = scores.masked_fill(~(passed | ~positive), -1.0).max(-1)
            peak = peaks.gather(-1, winner[:, None])[:, 0]
            query = ((best >= 0) & (peak >= self.text_threshold) & positive[winner]).nonzero()[:, 0]
            column = winner[query]
        return {
            "scores": scores[query, column],
            "labels": labels[column],
            "boxes": cxcywh_to_xyxy(boxes.float()[query]),
            "queries": query,
        }

    def merged(
        self, parts: Sequence[dict[str, Tensor]], labels: Sequence[str], scale: Tensor | None, like: Tensor
    ) -> dict[str, Any]:
        """Merge the results of an image's prompts, best first.

        Args:
            parts: Results of `select` for each prompt.
            labels: The image's labels.
            scale: (4,) factors from 0..1 to pixels; None leaves boxes in 0..1.
            like: Any tensor on the device of the results.

        Returns:
            "scores", "boxes", "text_labels", "labels" and "queries".
        """
        if not parts:
            nothing = torch.empty(0, device=like.device)
            numbers = {"labels": nothing.long(), "queries": nothing.long()}
            parts = [{"scores": nothing, "boxes": nothing.view(0, 4), **numbers}]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if scale is not None:
            found["boxes"] = found["boxes"] * scale
        if self.nms_threshold is not None and self.nms_threshold < 1:
            if self.class_agnostic_nms:
                keep = nms(found["boxes"], found["scores"], self.nms_threshold)
            else:
                keep = batched_nms(found["boxes"], found["scores"], found["labels"], self.nms_threshold)
            found = {name: value[keep] for name, value in found.items()}
        order = found["scores"].argsort(descending=True, stable=True)[: self.top_k]
        picked = found["labels"][order]
        return {
            "scores": found["scores"][order],
            "boxes": found["boxes"][order],
            "text_labels": [labels[index] for index in picked.tolist()],
            "labels": picked,
            "queries": found["queries"][order],
        }
