"""Masks of the boxes that are shown: made when a box is first shown, and kept with the outputs of its picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gdino_hf import Detections
from gdino_hf.segmentation.segmenter import PictureFeatures

from .safety import MEGABYTE, Refused

OFF = "off"
"""The choice of no masks."""
MOST_MASK_BYTES = 256 * MEGABYTE
"""Memory of a picture's masks, which take a byte for each pixel and box."""


def most_masks(size: tuple[int, int]) -> int:
    """Return how many masks a picture of this (width, height) can have."""
    return max(MOST_MASK_BYTES // (size[0] * size[1]), 1)


class PictureMasks:
    """Makes and keeps the masks of boxes in one picture.

    Args:
        name: Name of the segmenter.
        features: What the segmenter computed for the picture, on the CPU.
        make: Function from the features and boxes (N, 4) to their masks (N, height, width).
        tighten: Whether boxes become the bounds of their masks.
    """

    def __init__(
        self,
        name: str,
        features: PictureFeatures,
        make: Callable[[PictureFeatures, np.ndarray], np.ndarray],
        tighten: bool,
    ) -> None:
        self.name, self.tighten = name, tighten
        self._features: PictureFeatures | None = features
        self._make = make
        # By the corners of the box, the mask's bits.
        self._made: dict[tuple[float, ...], np.ndarray] = {}

    @property
    def num_bytes(self) -> int:
        """Memory in bytes that this takes."""
        tensors = [] if self._features is None else _tensors(self._features.embeddings)
        return sum(x.numel() * x.element_size() for x in tensors) + sum(
            bits.nbytes for bits in self._made.copy().values()
        )

    def forget_picture(self) -> None:
        """Free what the segmenter computed for the picture; from now on only boxes that have a mask can be added."""
        self._features = None

    def add(self, found: Detections) -> Detections:
        """Return detections in the picture with their masks.

        Raises:
            Refused: The masks would take more than `MOST_MASK_BYTES`.
        """
        (width, height), most = found.size, most_masks(found.size)
        if len(found) > most:
            raise Refused(
                f"{len(found)} boxes in a picture of {width}x{height} pixels have too many masks; at most {most} fit "
                "into memory: raise the score threshold, or choose no masks."
            )
        keys = [tuple(box) for box in found.boxes.tolist()]
        known = {key: self._made[key] for key in keys if key in self._made}
        missing = [key for key in dict.fromkeys(keys) if key not in known]
        if missing:
            assert self._features is not None, "the picture was forgotten"
            made = self._make(self._features, np.array(missing))
            known |= {key: np.packbits(mask) for key, mask in zip(missing, made, strict=True)}
            # What is no longer shown is forgotten when there is no room for it.
            self._made = known if len(self._made) + len(missing) > most else {**self._made, **known}
        masks = np.zeros((len(found), height, width), dtype=bool)
        for place, key in enumerate(keys):
            masks[place] = np.unpackbits(known[key], count=width * height).reshape(height, width)
        with_masks = replace(found, masks=masks)
        return with_masks.tightened() if self.tighten else with_masks


def moved(features: PictureFeatures, device: torch.device | str) -> PictureFeatures:
    """Return a picture's features on another device, without its pixels, which no mask needs any more."""
    inputs = features.inputs
    # Only the shape is read from here on; this has it and takes the memory of one number.
    shape = torch.zeros(()).expand(inputs.pixel_values.shape)
    embeddings = {name: _moved(value, device) for name, value in features.embeddings.items()}
    return PictureFeatures(replace(inputs, pixel_values=shape), embeddings)


def _moved(value: Any, device: torch.device | str) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else [_moved(each, device) for each in value]


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for each in (value.values() if isinstance(value, dict) else value) for tensor in _tensors(each)]
