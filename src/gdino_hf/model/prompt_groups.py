"""Many prompts for few images, in forward passes over groups of prompts, so that memory stays bounded."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from .outputs_gdino import GDinoImageFeatures

IMAGE_TOKENS_AT_ONCE = 4_000
"""Image tokens that one forward pass holds if there are more prompts than images; an 800 x 1333 picture has 22,223."""

_OF_IMAGES = ("pixel_values", "pixel_mask", "image_sizes")
_OF_PROMPTS = ("input_ids", "attention_mask", "token_type_ids")


def forward_in_groups(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Detect with labels that take several prompts, a group of prompts at a time.

    A forward pass over all prompts of 1,203 labels takes several times the memory of one over 20 labels. Here the
    image backbone runs once, and every further pass has at most as many prompts as there are images, or as many as
    `IMAGE_TOKENS_AT_ONCE` allow if pictures are small.

    Args:
        model: A GDinoForObjectDetection.
        inputs: The processor's output on the model's device, with pixel_values and input_ids. If there is one prompt
            per image, this is one usual forward pass.

    Returns:
        An object with logits (R, Q, max_text_len) and pred_boxes (R, Q, 4) of all R prompts.
    """
    image_indices = inputs.get("image_indices")
    if image_indices is None:
        return model(**{**inputs, "return_dict": True})
    images = {name: inputs[name] for name in _OF_IMAGES if name in inputs}
    features = model.get_image_features(**images, return_dict=True)
    at_once = rows_at_once(features)
    prompts = {name: inputs[name] for name in _OF_PROMPTS if inputs.get(name) is not None}
    if len(image_indices) <= at_once:
        return model(image_features=features, image_indices=image_indices, return_dict=True, **prompts)
    logits, boxes = [], []
    for start in range(0, len(image_indices), at_once):
        rows = slice(start, start + at_once)
        outputs = model(
            image_features=features_of_rows(features, image_indices[rows]),
            **{name: value[rows] for name, value in prompts.items()},
            return_dict=True,
        )
        logits.append(outputs.logits)
        boxes.append(outputs.pred_boxes)
    return SimpleNamespace(logits=torch.cat(logits), pred_boxes=torch.cat(boxes))


def rows_at_once(features: GDinoImageFeatures) -> int:
    """Return the largest number of pairs of image and prompt that one forward pass should have.

    Args:
        features: Features of B images.

    Returns:
        B or more.
    """
    tokens = sum(level.shape[-2] * level.shape[-1] for level in features.feature_maps)
    return max(features.feature_maps[0].shape[0], IMAGE_TOKENS_AT_ONCE // tokens)


def features_of_rows(features: GDinoImageFeatures, indices: torch.Tensor) -> GDinoImageFeatures:
    """Return the features of each prompt's image.

    Args:
        features: Features of B images.
        indices: (R,) int64 index of each prompt's image.

    Returns:
        Features of R images.
    """
    return GDinoImageFeatures(
        feature_maps=tuple(level.index_select(0, indices) for level in features.feature_maps),
        masks=features.masks and tuple(mask.index_select(0, indices) for mask in features.masks),
        padding_seen=features.padding_seen,
    )
