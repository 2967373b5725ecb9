"""Segmenter: pictures and their boxes in, the same detections with a mask for each box out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..detection.detections import Detections
from ..detection.loading import usable_device
from ..model.option_flags import checked_count, checked_flag
from ..model.picture_pixels import load_image
from ..model.remote_pictures import downloaded
from ..model.tensor_values import is_picture
from .segmenter_inputs import PictureInputs, inputs_of
from .segmenter_loading import DTYPES, LoadedSegmenter, load_segmenter, wrap_segmenter

# Numbers of a picture's masks that are in memory as float32 before they become bool: 128 MB.
_MOST_LOGITS = 2**25


@dataclass(frozen=True)
class PictureFeatures:
    """What a segmenter computes once for a picture, whatever its boxes are.

    Attributes:
        inputs: How the picture was prepared.
        embeddings: Arguments of the model that stand for the picture.
    """

    inputs: PictureInputs
    embeddings: dict[str, Any]


class Segmenter:
    """A model of the SAM family that turns boxes into masks.

        segmenter = Segmenter("facebook/sam2.1-hiera-tiny")
        found = segmenter("street.jpg", detector("street.jpg", ["cat"]))
        found.masks
        detector = Detector("nano", segmenter=segmenter)        # or masks with every detection

    Each box gets the one mask that the model predicts for an unambiguous prompt (`multimask_output=False`): pixels
    whose logit, resized to the picture, is above 0. The image features are computed once per picture.

    Args:
        model: Hub id, folder or model object of SAM, SAM-HQ, SAM 2, SAM 2.1, SAM 3's tracker or EdgeTAM. A model object
            is put in eval mode, and is moved only if a device or a dtype is given.
        device: "auto" (the first GPU, or the CPU), "cpu", "cuda", "cuda:1", ...; None is "auto" for a name and leaves a
            model object where it is.
        dtype: "float32", "bfloat16" or "float16"; None for that of a model object, otherwise "float32".
        tighten: Whether boxes become the bounds of their masks, see `Detections.tightened`.
        boxes_at_once: Most boxes of a picture in one pass of the mask decoder, which bounds its memory.

    Raises:
        TypeError: The model has another type.
        ValueError: The model, the device or the dtype cannot be used here.
    """

    def __init__(
        self,
        model: Any,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        *,
        tighten: bool = False,
        boxes_at_once: int = 16,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"The segmenter's dtype is {dtype!r}; choose {', '.join(DTYPES)}.")
        self.tighten = checked_flag(tighten, "tighten")
        self.boxes_at_once = checked_count(boxes_at_once, "boxes_at_once")
        loaded: LoadedSegmenter
        if isinstance(model, (str, os.PathLike)):
            place: torch.device | None = usable_device("auto" if device is None else device)
            loaded = load_segmenter(str(model), dtype or "float32")
        else:
            place = None if device is None else usable_device(device)
            loaded = wrap_segmenter(model)
            if dtype is not None:
                loaded.model.to(getattr(torch, dtype))
        self.model, self._look = loaded.model.eval(), loaded.look
        if place is not None:
            self.model.to(place)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        device: torch.device = self.model.device
        return device

    def __call__(self, images: Any, found: Detections | Sequence[Detections], *, batch_size: int = 1) -> Any:
        """Find the mask of each box.

        Args:
            images: One picture in any form that `Detector` takes, or a list of them.
            found: Its detections, or a list of those of each picture.
            batch_size: Number of pictures in one pass of the image encoder.

        Returns:
            `Detections` with masks for one picture, a list of them for a list. A picture without boxes has no masks,
            an array of shape (0, height, width), and costs no pass.

        Raises:
            TypeError: A picture has another type, or there is one for several detections.
            ValueError: A picture cannot be used or is not the one that the boxes are of.
        """
        if is_picture(images):
            if not isinstance(found, Detections):
                raise TypeError(f"found is a {type(found).__name__}; give the Detections of the one picture.")
            return self._segment([images], [found], 1)[0]
        pictures = list(images)
        boxes: list[Any] = list(found)
        if len(pictures) != len(boxes):
            raise ValueError(f"There are {len(pictures)} pictures and detections of {len(boxes)}; give as many.")
        return self._segment(pictures, boxes, checked_count(batch_size, "batch_size"))

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> list[PictureFeatures]:
        """Compute the image features of pictures in one pass.

        Args:
            images: Upright RGB pictures.
        """
        inputs = [inputs_of(image, self._look) for image in images]
        pixels = torch.cat([each.pixel_values for each in inputs]).to(self.device, self.model.dtype)
        made = self.model.get_image_embeddings(pixels)
        # SAM-HQ also returns the features of its encoder's inner layers, which its decoder reads.
        names = ("image_embeddings", "intermediate_embeddings") if isinstance(made, tuple) else ("image_embeddings",)
        values = dict(zip(names, made if isinstance(made, tuple) else (made,), strict=True))
        return [
            PictureFeatures(each, {name: _of_one(value, place) for name, value in values.items()})
            for place, each in enumerate(inputs)
        ]

    @torch.inference_mode()
    def masks(self, features: PictureFeatures, boxes: np.ndarray) -> np.ndarray:
        """Find the masks of boxes in a picture whose features are known.

        Args:
            features: What `features` returned for it.
            boxes: (N, 4) xyxy in pixels of the picture.

        Returns:
            (N, height, width) bool at the picture's size.
        """
        width, height = features.inputs.size
        masks = np.zeros((len(boxes), height, width), dtype=bool)
        at_once = max(1, _MOST_LOGITS // (width * height))
        for start in range(0, len(boxes), self.boxes_at_once):
            part = features.inputs.boxes(boxes[start : start + self.boxes_at_once]).to(self.device)
            made = self.model(input_boxes=part[None], multimask_output=False, **features.embeddings)
            logits = made.pred_masks[0, :, :1].float()
            for first in range(0, len(logits), at_once):
                resized = features.inputs.at_picture_size(logits[first : first + at_once])
                masks[start + first : start + first + len(resized)] = (resized[:, 0] > 0).cpu().numpy()
        return masks

    def _segment(self, images: Sequence[Any], found: Sequence[Detections], batch_size: int) -> list[Detections]:
        """Return detections with masks; pictures are read, encoded and forgotten a batch at a time."""
        results = [replace(each, masks=np.zeros((0, *each.size[::-1]), dtype=bool)) for each in (f[:0] for f in found)]
        places = [place for place, each in enumerate(found) if len(each)]
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            pictures = [_picture(images[place], found[place]) for place in batch]
            for place, features in zip(batch, self.features(pictures), strict=True):
                with_masks = replace(found[place], masks=self.masks(features, found[place].boxes))
                results[place] = with_masks.tightened() if self.tighten else with_masks
        return results


def _picture(image: Any, found: Detections) -> Image.Image:
    picture = load_image(downloaded(image))
    if picture.size != found.size:
        raise ValueError(
            f"The picture is {picture.width}x{picture.height} pixels, but the boxes are from one of "
            f"{found.size[0]}x{found.size[1]}; give that one."
        )
    return picture


def _of_one(value: Any, place: int) -> Any:
    """Return one picture's part of a batch of features: a tensor, or a list of them for several levels."""
    return value[place : place + 1] if isinstance(value, torch.Tensor) else [each[place : place + 1] for each in value]
