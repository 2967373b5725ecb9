"""What a segmenter sees: the picture resized and normalized, boxes in its pixels, and masks brought back from there.

SAM 2, SAM 3's tracker and EdgeTAM stretch a picture to a square; SAM and SAM-HQ keep its proportions and fill the
square at the right and the bottom. transformers' processors of the former need torchvision, so their preparation is
written out here, with the same operations on the same values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

_INTERPOLATIONS = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


@dataclass(frozen=True)
class Look:
    """How a segmenter looks at pictures.

    Attributes:
        size: (height, width) in pixels of what the model sees.
        mean: Mean of each colour channel, 0..1; None if `processor` prepares pictures.
        std: Standard deviation of each colour channel, 0..1; None if `processor` prepares pictures.
        resample: Number of PIL's interpolation.
        processor: transformers' image processor, for models that keep a picture's proportions; None stretches it.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resample: int = int(Image.Resampling.BILINEAR)
    processor: Any = None

    def __post_init__(self) -> None:
        if self.resample not in _INTERPOLATIONS:
            raise ValueError(
                f"its processor's resample is {self.resample}, which is neither 2 (bilinear) nor 3 (bicubic)"
            )


@dataclass(frozen=True)
class PictureInputs:
    """A picture as the model sees it.

    Attributes:
        pixel_values: (1, 3, H, W) float32.
        size: (width, height) of the picture in pixels.
        seen: (height, width) in pixels of the part of `pixel_values` that shows the picture.
    """

    pixel_values: torch.Tensor
    size: tuple[int, int]
    seen: tuple[int, int]

    def boxes(self, boxes: np.ndarray) -> torch.Tensor:
        """Return (N, 4) xyxy boxes in pixels of the picture as float32 in pixels of what the model sees."""
        width, height = self.size
        across, down = self.seen[1] / width, self.seen[0] / height
        return torch.from_numpy(np.asarray(boxes, dtype=np.float32) * np.array([across, down] * 2)).float()

    def at_picture_size(self, logits: torch.Tensor) -> torch.Tensor:
        """Return (N, 1, h, w) mask logits of the model as (N, 1, height, width) at the picture's size."""
        whole = tuple(self.pixel_values.shape[2:])
        if self.seen != whole:
            logits = F.interpolate(logits, whole, mode="bilinear", align_corners=False)
            logits = logits[..., : self.seen[0], : self.seen[1]]
        return F.interpolate(logits, self.size[::-1], mode="bilinear", align_corners=False)


def inputs_of(image: Image.Image, look: Look) -> PictureInputs:
    """Prepare a picture.

    Args:
        image: Upright RGB picture.
        look: How the model looks at pictures.
    """
    if look.processor is not None:
        made = look.processor(images=image, return_tensors="pt")
        height, width = (int(side) for side in made["reshaped_input_sizes"][0])
        return PictureInputs(made["pixel_values"], image.size, (height, width))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()[None]
    if tuple(pixels.shape[2:]) != look.size:
        mode = _INTERPOLATIONS[Image.Resampling(look.resample)]
        pixels = F.interpolate(pixels, look.size, mode=mode, align_corners=False, antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] * 255.0 for values in (look.mean, look.std))
    return PictureInputs((pixels.float() - mean) / std, image.size, look.size)
