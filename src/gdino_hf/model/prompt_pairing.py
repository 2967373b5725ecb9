"""Pairs of image and prompt: one prompt per image, one for all images, or several prompts (chunks) per image."""

from typing import Any

import torch
from torch import Tensor

from .outputs_gdino import GDinoImageFeatures, GDinoTextFeatures


def pair(
    images: GDinoImageFeatures, prompts: GDinoTextFeatures, image_indices: Tensor | None
) -> tuple[GDinoImageFeatures, GDinoTextFeatures]:
    """Repeat images or prompts so that row i of the images belongs to row i of the prompts.

    Args:
        images: Features of B images.
        prompts: Features of R prompts. R must be B or 1, unless B is 1 or image_indices is given.
        image_indices: (R,) int64 index of each prompt's image, or None. Every image must have a prompt.

    Returns:
        Features of max(B, R) images and of as many prompts.

    Raises:
        ValueError: The numbers of images and prompts do not fit, or an image has no prompt.
    """
    num_images, num_prompts = images.feature_maps[0].shape[0], prompts.last_hidden_state.shape[0]
    if image_indices is not None:
        _check_indices(image_indices, num_images, num_prompts)
        picked = GDinoImageFeatures(
            feature_maps=tuple(x.index_select(0, image_indices) for x in images.feature_maps),
            masks=images.masks and tuple(x.index_select(0, image_indices) for x in images.masks),
            padding_seen=images.padding_seen,
        )
        return picked, prompts
    if num_images == num_prompts:
        return images, prompts
    if num_prompts == 1:
        # The states of the text backbone, which are tuples, are of no use from here on.
        repeated: dict[str, Any] = {
            name: x.expand(num_images, *x.shape[1:]) for name, x in prompts.items() if isinstance(x, Tensor)
        }
        return images, GDinoTextFeatures(**repeated)
    if num_images == 1:
        repeated_images = GDinoImageFeatures(
            feature_maps=tuple(x.expand(num_prompts, -1, -1, -1) for x in images.feature_maps),
            masks=images.masks and tuple(x.expand(num_prompts, -1, -1) for x in images.masks),
            padding_seen=images.padding_seen,
        )
        return repeated_images, prompts
    raise ValueError(
        f"There are {num_images} images and {num_prompts} prompts; give one prompt per image, one for all, or "
        "image_indices."
    )


def check_trainable(images: GDinoImageFeatures, prompts: GDinoTextFeatures, image_indices: Tensor | None) -> None:
    """Raise an error if an image has several prompts, since its training labels can refer to only one.

    Args:
        images: Features of B images.
        prompts: Features of R prompts.
        image_indices: (R,) int64 index of each prompt's image, or None.

    Raises:
        ValueError: An image may have several prompts.
    """
    if image_indices is not None or prompts.last_hidden_state.shape[0] > images.feature_maps[0].shape[0]:
        raise ValueError(
            "labels go with one prompt per image, but an image has several prompts; keep an image's labels within "
            "max_text_len tokens in training, for instance by sampling fewer negatives."
        )


def required(value: Tensor | None, kind: str, name: str) -> Tensor:
    """Return an input of forward, or raise a ValueError if neither it nor its features were given."""
    if value is None:
        raise ValueError(f"There is no {kind}: give {name} or {kind}_features.")
    return value


def _check_indices(image_indices: Tensor, num_images: int, num_prompts: int) -> None:
    if image_indices.shape != (num_prompts,):
        raise ValueError(
            f"image_indices is {tuple(image_indices.shape)} for {num_prompts} prompts; give one image per prompt."
        )
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        # Values are unknown while the graph is being traced.
        return
    named = set(image_indices.tolist())
    if named != set(range(num_images)):
        raise ValueError(
            f"image_indices names the images {sorted(named)} but there are {num_images}, each of which needs a prompt; "
            "if labels take several prompts, prepare text and images in one call of the processor."
        )
