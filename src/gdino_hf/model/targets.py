"""Training labels: checked, and concatenated over the batch for matching, losses and denoising."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .box_ops import cxcywh_to_xyxy

# How far a corner may lie outside the image, as a share of the image: enough for annotations rounded to pixels.
BOX_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Targets:
    """The M annotated boxes of a batch of images, one image after the other.

    Attributes:
        boxes: (M, 4) float32 cxcywh in [0, 1].
        class_labels: (M,) int64 index of each box's label in its image's prompt.
        positive_maps: (M, T) bool, True on the prompt tokens that name the box.
        batch_index: (M,) int64 index of each box's image, ascending.
        sizes: Number of boxes of each image; they add up to M.
    """

    boxes: Tensor
    class_labels: Tensor
    positive_maps: Tensor
    batch_index: Tensor
    sizes: list[int]

    @property
    def num_boxes(self) -> int:
        """Number of boxes M of the whole batch."""
        return self.boxes.shape[0]


class OpaqueLabels:
    """Labels inside an object that torch.compile does not look into.

    A compiled function has a variant for every combination of no, one and several boxes among the images of a batch if
    it receives their tensors, even if it only passes them on.

    Args:
        labels: One mapping per image, see `prepare_targets`.
    """

    def __init__(self, labels: Sequence[Mapping[str, Tensor]]) -> None:
        self.labels = labels


def compile_from_below(method: Callable[..., Any]) -> None:
    """Make torch.compile begin below a method, in the functions that it calls.

    A method marked by `torch.compiler.disable` could no longer be part of a larger compiled module, so this uses an
    internal function of torch. Without it, `OpaqueLabels` has no effect: training then compiles more often.

    Args:
        method: A method of a module, which calls the module's forward.
    """
    try:
        from torch._dynamo.eval_frame import skip_code
    except ImportError:
        return
    skip_code(method.__code__)


def phrase_counts(phrase_ids: Tensor) -> Tensor:
    """Return the number of labels in each prompt.

    Args:
        phrase_ids: (B, T) number of the label that each token belongs to, -1 on special tokens and padding.

    Returns:
        (B,) int64 numbers of labels.
    """
    return phrase_ids.amax(dim=-1) + 1


def prepare_targets(
    labels: Sequence[Mapping[str, Tensor]] | OpaqueLabels,
    phrase_ids: Tensor,
    attention_mask: Tensor,
    check: bool = True,
) -> Targets:
    """Check the labels of a batch and concatenate them on the model's device.

    Nothing is checked under torch.compile, where reading values would break the graph.

    Args:
        labels: One mapping per image with "class_labels", (N,) index of each box's label in the image's prompt, and
            "boxes", (N, 4) cxcywh in [0, 1]; N may be 0. An optional "positive_map", (N, any number of tokens), marks
            the tokens that name each box; without it they are the tokens of the box's label.
        phrase_ids: (B, T) number of the label that each token belongs to, -1 on special tokens and padding.
        attention_mask: (B, T) mask, nonzero on real tokens.
        check: Whether to check the labels. Reading their values waits for the device.

    Returns:
        The targets, on the device of `phrase_ids`.

    Raises:
        TypeError: `labels` is not a sequence of mappings of tensors.
        ValueError: The number of images differs, a key is missing, a shape is wrong, a coordinate is not finite or
            outside the image, a side is not positive, a class index is no label of the image's prompt, or a box names
            no token.
    """
    labels = labels.labels if isinstance(labels, OpaqueLabels) else labels
    check = check and not torch.compiler.is_compiling()
    if check:
        _check_shapes(labels, phrase_ids.shape[0])
    device, num_tokens = phrase_ids.device, phrase_ids.shape[1]
    sizes = [label["boxes"].shape[0] for label in labels]
    boxes = torch.cat([label["boxes"].to(device, torch.float32) for label in labels])
    class_labels = torch.cat([label["class_labels"].to(device, torch.int64) for label in labels])
    batch_index = torch.cat(
        [torch.full((size,), image, dtype=torch.int64, device=device) for image, size in enumerate(sizes)]
    )
    positive_maps = phrase_ids[batch_index] == class_labels[:, None]
    if any("positive_map" in label for label in labels):
        spans = positive_maps.split(sizes)
        positive_maps = torch.cat(
            [
                _fit_tokens(label["positive_map"].to(device) > 0, num_tokens) if "positive_map" in label else span
                for label, span in zip(labels, spans, strict=True)
            ]
        )
    positive_maps = positive_maps & (attention_mask[batch_index] > 0)
    targets = Targets(boxes, class_labels, positive_maps, batch_index, sizes)
    if check:
        _check_values(targets, phrase_ids)
    return targets


def check_replica(labels: Sequence[Mapping[str, Tensor]] | OpaqueLabels, num_images: int) -> None:
    """Raise an error if nn.DataParallel gave a replica labels that do not belong to its images.

    DataParallel splits each tensor along its first axis, and a list by splitting every tensor inside. So a replica gets
    some images, but an entry for every image of the batch, each with some of its boxes.

    Args:
        labels: The labels that the replica got.
        num_images: Number of the replica's images.

    Raises:
        ValueError: The numbers differ.
    """
    entries = labels.labels if isinstance(labels, OpaqueLabels) else labels
    if len(entries) != num_images:
        raise ValueError(
            f"nn.DataParallel gave a replica {len(entries)} entries of labels for {num_images} images, since it cannot "
            "split a list of labels: train on several devices with one process each (torchrun or accelerate launch)."
        )


def _fit_tokens(token_map: Tensor, num_tokens: int) -> Tensor:
    missing = num_tokens - token_map.shape[1]
    return torch.nn.functional.pad(token_map, (0, missing)) if missing > 0 else token_map[:, :num_tokens]


def _check_shapes(labels: Sequence[Mapping[str, Tensor]], batch_size: int) -> None:
    if isinstance(labels, (Mapping, Tensor, str)) or not isinstance(labels, Sequence):
        raise TypeError(
            f"labels is a {type(labels).__name__}; give a list with one dict of class_labels and boxes per image."
        )
    if len(labels) != batch_size:
        raise ValueError(f"labels has {len(labels)} entries for {batch_size} images; give one per image, empty or not.")
    for image, label in enumerate(labels):
        if not isinstance(label, Mapping):
            raise TypeError(f"labels[{image}] is a {type(label).__name__}; give a dict with class_labels and boxes.")
        for key in ("class_labels", "boxes"):
            if key not in label:
                raise ValueError(f"labels[{image}] has no {key!r}, only {sorted(label)}; give class_labels and boxes.")
        for key in ("class_labels", "boxes", "positive_map"):
            if key in label and not isinstance(label[key], Tensor):
                raise TypeError(f"labels[{image}][{key!r}] is a {type(label[key]).__name__}; give a torch tensor.")
        boxes, class_labels = label["boxes"], label["class_labels"]
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(
                f"labels[{image}]['boxes'] has shape {tuple(boxes.shape)}; give (N, 4) cxcywh, (0, 4) for no boxes."
            )
        if class_labels.shape != boxes.shape[:1]:
            raise ValueError(
                f"labels[{image}]['class_labels'] has shape {tuple(class_labels.shape)} for {boxes.shape[0]} boxes; "
                f"give one class index per box."
            )
        # torch makes a float tensor of an empty list, so the dtype is checked only if there are boxes.
        if boxes.shape[0] and (class_labels.is_floating_point() or class_labels.dtype == torch.bool):
            raise ValueError(
                f"labels[{image}]['class_labels'] is {class_labels.dtype}; give integers that index the image's labels."
            )
        if "positive_map" in label:
            token_map = label["positive_map"]
            if token_map.ndim != 2 or token_map.shape[0] != boxes.shape[0]:
                raise ValueError(
                    f"labels[{image}]['positive_map'] has shape {tuple(token_map.shape)} for {boxes.shape[0]} boxes; "
                    f"give one row of tokens per box."
                )


def _check_values(targets: Targets, phrase_ids: Tensor) -> None:
    """Check all values with one copy from the device; only if a check fails, find out which value is wrong."""
    boxes, corners = targets.boxes, cxcywh_to_xyxy(targets.boxes)
    limits = phrase_counts(phrase_ids)[targets.batch_index]
    faults = torch.stack(
        (
            ~torch.isfinite(boxes).all(dim=-1),
            (boxes[:, 2:] <= 0).any(dim=-1),
            ((corners < -BOX_TOLERANCE) | (corners > 1 + BOX_TOLERANCE)).any(dim=-1),
            (targets.class_labels < 0) | (targets.class_labels >= limits),
            ~targets.positive_maps.any(dim=-1),
        )
    )
    if not faults.any():
        return
    row = int(faults.any(dim=0).nonzero()[0])
    image = int(targets.batch_index[row])
    index = row - sum(targets.sizes[:image])
    box = [round(value, 4) for value in boxes[row].tolist()]
    not_finite, flat, outside, no_label, _ = faults[:, row].tolist()
    where = f"labels[{image}]['boxes'][{index}] = {box}"
    if not_finite:
        raise ValueError(f"{where} is not finite; drop the box or repair its annotation.")
    if flat:
        raise ValueError(f"{where} has a width or height that is not above 0; give cxcywh and drop empty boxes.")
    if outside:
        raise ValueError(
            f"{where} leaves the image by more than {BOX_TOLERANCE}; give cxcywh divided by the image's size, clipped "
            f"to 0..1."
        )
    if no_label:
        raise ValueError(
            f"labels[{image}]['class_labels'][{index}] = {int(targets.class_labels[row])} is none of the "
            f"{int(limits[row])} labels of image {image}; give 0 to {int(limits[row]) - 1}, not a dataset's category."
        )
    raise ValueError(
        f"labels[{image}]['positive_map'][{index}] marks no real token of the prompt; mark those that name the box."
    )
