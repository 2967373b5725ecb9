"""The image backbone: any AutoBackbone, projected to a feature pyramid of the model's width, with padding masks."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone

from .configuration_gdino import GDinoConfig
from .swin_export import export_forward, knows
from .transformers_internals import build_part

# torch 2.6 has no is_exporting, so there compiling counts as exporting.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class FrozenBatchNorm2d(nn.Module):
    """Batch normalization with fixed statistics, since batches in detection are too small to estimate them.

    Args:
        num_features: Number of channels.
        eps: Added to the variance.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:  # type: ignore[no-untyped-def]
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a map (B, C, h, w)."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm2d inside a module by a frozen one with the same statistics.

    Args:
        module: The module to change in place.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            if child.weight.device.type != "meta":
                frozen.load_state_dict(child.state_dict(), strict=False)
            setattr(module, name, frozen.to(child.weight.device))
        else:
            freeze_batch_norm(child)


def build_backbone(backbone_config: Any) -> Any:
    """Build the AutoBackbone that a configuration describes; see `build_part` for its attention implementation."""
    return build_part(lambda: AutoBackbone.from_config(backbone_config), backbone_config)


def unused_parameters(config: GDinoConfig) -> list[str]:
    """Find parameters of the image backbone that no used feature map depends on, such as a final norm or mask tokens.

    Checkpoints hold them, so they stay, but they must not train: data-parallel training would wait for their gradients.
    They are found by differentiating a backbone on the meta device, which needs no memory and little time.

    Args:
        config: The model's configuration.

    Returns:
        Names of the parameters within the AutoBackbone.
    """
    backbone: Any = config.backbone_config
    key = (backbone.to_json_string(use_diff=False), config.num_feature_levels)
    if key not in _UNUSED:
        _UNUSED[key] = _find_unused(config)
    return _UNUSED[key]


_UNUSED: dict[tuple[str, int], list[str]] = {}
"""Results of `unused_parameters`: a process often loads several models of one kind."""


def _find_unused(config: GDinoConfig) -> list[str]:
    with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
        probe = build_backbone(config.backbone_config)
        try:
            maps = probe(torch.empty(1, 3, 64, 64)).feature_maps
        except (NotImplementedError, RuntimeError):
            return []
        names, parameters = zip(*[item for item in probe.named_parameters() if item[1].requires_grad], strict=True)
        total = sum(x.sum() for x in maps[-config.num_feature_levels :])
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]


class ConvEncoder(nn.Module):
    """Wrapper that gives the AutoBackbone the module name that checkpoints use."""

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__()
        self.model = build_backbone(config.backbone_config)
        for name in unused_parameters(config):
            self.model.get_parameter(name).requires_grad_(False)
        freeze_batch_norm(self.model)


class Backbone(nn.Module):
    """The image backbone.

    Any AutoBackbone that gives maps (B, C, h, w) works. The maps of a plain ViT all have one stride, which is allowed
    although they form no pyramid.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__()
        self.conv_encoder = ConvEncoder(config)
        # A faster implementation of `forward`, which gdino_hf.inference sets. Not used while exporting a Swin.
        self.fast_forward: Callable[[Tensor], list[Tensor]] | None = None

    @property
    def channels(self) -> list[int]:
        """Number of channels of each map."""
        return list(self.conv_encoder.model.channels)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Compute the feature maps of images.

        Args:
            pixel_values: (B, 3, H, W) normalized pixels.

        Returns:
            Maps (B, C_l, h_l, w_l), fine to coarse.
        """
        if is_exporting() and knows(self.conv_encoder.model):
            return export_forward(self.conv_encoder.model, pixel_values)
        if self.fast_forward is not None:
            return self.fast_forward(pixel_values)
        return list(self.conv_encoder.model(pixel_values).feature_maps)

    def record(self, outputs: list[Any], requests: Mapping[str, bool], pixel_values: Tensor) -> list[Tensor]:
        """Compute the feature maps like `forward`, and keep all that the AutoBackbone returns.

        Args:
            outputs: List that the AutoBackbone's output is appended to.
            requests: Keyword arguments for the AutoBackbone, such as `output_hidden_states=True`.
            pixel_values: (B, 3, H, W) normalized pixels.

        Returns:
            Maps (B, C_l, h_l, w_l), fine to coarse.
        """
        outputs.append(self.conv_encoder.model(pixel_values, **requests))
        return list(outputs[-1].feature_maps)


def input_projections(channels: Sequence[int], num_levels: int, width: int) -> nn.ModuleList:
    """Build one projection to the model's width per level.

    Levels beyond the backbone's maps are computed by strided convolutions.

    Args:
        channels: Number of channels of the backbone's maps, fine to coarse. The last num_levels maps are used.
        num_levels: Number of levels L.
        width: The model's width D.

    Returns:
        L projections for `project`.
    """

    def make(in_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(in_channels, width, kernel_size, stride, padding=kernel_size // 2)
        return nn.Sequential(convolution, nn.GroupNorm(math.gcd(32, width), width))

    used = channels[-num_levels:]
    extra = num_levels - len(used)
    projections = [make(n, 1) for n in used]
    projections += [make(used[-1] if index == 0 else width, 3, 2) for index in range(extra)]
    return nn.ModuleList(projections)


def project(
    backbone: Callable[[Tensor], list[Tensor]], projections: nn.ModuleList, pixel_values: Tensor
) -> list[Tensor]:
    """Run the backbone and project its maps to the model's width.

    Args:
        backbone: The image backbone, from pixels to maps.
        projections: L projections, see `input_projections`.
        pixel_values: (B, 3, H, W) normalized pixels.

    Returns:
        L maps (B, D, h_l, w_l), fine to coarse.
    """
    maps = backbone(pixel_values)[-len(projections) :]
    features = [projection(x) for projection, x in zip(projections, maps, strict=False)]
    for index in range(len(maps), len(projections)):
        # The first extra level reads the backbone's last map; each further level reads the one before it.
        features.append(projections[index](maps[-1] if index == len(maps) else features[-1]))
    return features


def project_by_size(
    backbone: Callable[[Tensor], list[Tensor]],
    projections: nn.ModuleList,
    pixel_values: Tensor,
    image_sizes: Sequence[Sequence[int]],
) -> tuple[list[Tensor], list[Tensor]]:
    """Run backbone and projections on images of one size at a time, so that padding has no effect.

    Args:
        backbone: The image backbone, from pixels to maps.
        projections: L projections, see `input_projections`.
        pixel_values: (B, 3, H, W) normalized pixels, each image at the top left.
        image_sizes: (height, width) of each image in pixels.

    Returns:
        L maps (B, D, h_l, w_l), zero outside an image, and L masks (B, h_l, w_l) bool, True on real cells.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (height, width) in enumerate(image_sizes):
        groups.setdefault((int(height), int(width)), []).append(index)
    pieces = [
        project(backbone, projections, pixel_values[indices, :, :height, :width])
        for (height, width), indices in groups.items()
    ]
    order = torch.tensor([index for indices in groups.values() for index in indices], device=pixel_values.device)
    back = order.argsort()
    features, masks = [], []
    for level in zip(*pieces, strict=True):
        height, width = (max(x.shape[side] for x in level) for side in (-2, -1))
        frames = [(0, width - x.shape[-1], 0, height - x.shape[-2]) for x in level]
        padded = [F.pad(x, frame) for x, frame in zip(level, frames, strict=True)]
        real = [F.pad(torch.ones_like(x[:, 0], dtype=torch.bool), f) for x, f in zip(level, frames, strict=True)]
        features.append(torch.cat(padded).index_select(0, back))
        masks.append(torch.cat(real).index_select(0, back))
    return features, masks


def check_pixels(pixel_values: Tensor, pixel_mask: Tensor | None, channels: int) -> None:
    """Raise a clear error if pixels and their mask have the wrong shape.

    Args:
        pixel_values: Pixels, which should be (B, channels, H, W).
        pixel_mask: Mask, which should be (B, H, W), or None.
        channels: Number of channels that the backbone reads.

    Raises:
        ValueError: A shape is wrong, or there is no image.
    """
    if pixel_values.ndim != 4:
        raise ValueError(f"pixel_values must be (B, 3, H, W), got {tuple(pixel_values.shape)}; add a batch axis.")
    if pixel_values.shape[0] == 0 or pixel_values.shape[1] != channels:
        raise ValueError(
            f"pixel_values must hold at least one image of {channels} channels, got {tuple(pixel_values.shape)}; "
            "let the processor convert images."
        )
    if pixel_mask is not None and pixel_mask.shape != (pixel_values.shape[0], *pixel_values.shape[2:]):
        raise ValueError(
            f"pixel_mask is {tuple(pixel_mask.shape)} but pixel_values is {tuple(pixel_values.shape)}; give one "
            "(H, W) mask per image."
        )


def check_image_sizes(image_sizes: Tensor | Sequence[Sequence[int]], pixel_values: Tensor) -> bool:
    """Check the image sizes of a padded batch; return whether no image has padding.

    Args:
        image_sizes: (height, width) of each image in pixels, (B, 2) int64 or a list of pairs.
        pixel_values: (B, 3, H, W) pixels of the batch.

    Returns:
        True if there is no padding.

    Raises:
        ValueError: The number of sizes is not B, or an image is empty or larger than the batch.
    """
    batch, _, height, width = pixel_values.shape
    sizes = [(int(h), int(w)) for h, w in image_sizes]
    if len(sizes) != batch or any(not (0 < h <= height and 0 < w <= width) for h, w in sizes):
        raise ValueError(
            f"image_sizes {sizes} do not fit pixel_values {tuple(pixel_values.shape)}; give (height, width) of every "
            "image within the padded batch."
        )
    return all(size == (height, width) for size in sizes)


def resize_mask(pixel_mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Shrink a mask of pixels to the size of a feature map, by nearest neighbour.

    Args:
        pixel_mask: (B, H, W) mask, nonzero on real pixels.
        size: (h, w) of the feature map.

    Returns:
        (B, h, w) bool, True on real cells.
    """
    return F.interpolate(pixel_mask[None].float(), size=size)[0].bool()
