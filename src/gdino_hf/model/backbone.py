"""Any AutoBackbone as a multi-level feature pyramid with masks."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone

from .configuration_gdino import GDinoConfig
from .swin_export import export_forward, knows

# torch 2.6 does not tell exporting from compiling.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class FrozenBatchNorm2d(nn.Module):
    """Batch normalization by stored statistics that training never touches: detection batches are too small for it."""

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
        """(B, C, h, w) to the same."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm2d below a module by a frozen one with the same statistics."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            if child.weight.device.type != "meta":
                frozen.load_state_dict(child.state_dict(), strict=False)
            setattr(module, name, frozen.to(child.weight.device))
        else:
            freeze_batch_norm(child)


def unused_parameters(config: GDinoConfig) -> list[str]:
    """Parameters of the image backbone that no used feature map depends on: final norms, mask tokens, left-out stages.

    They stay, since checkpoints hold them, but do not train: data-parallel training would wait for their gradients.
    Found by tracing a backbone without storage, which takes no memory and hardly any time.
    """
    with torch.device("meta"), torch.enable_grad():
        probe = AutoBackbone.from_config(config.backbone_config)
        try:
            maps = probe(torch.empty(1, 3, 64, 64)).feature_maps
        except (NotImplementedError, RuntimeError):
            return []
        names, parameters = zip(*[item for item in probe.named_parameters() if item[1].requires_grad], strict=True)
        total = sum(x.sum() for x in maps[-config.num_feature_levels :])
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]


class ConvEncoder(nn.Module):
    """The image backbone itself, under the name that checkpoints give it."""

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__()
        self.model = AutoBackbone.from_config(config.backbone_config)
        for name in unused_parameters(config):
            self.model.get_parameter(name).requires_grad_(False)
        freeze_batch_norm(self.model)


class Backbone(nn.Module):
    """Feature maps of an image and which of their cells are real.

    Any model that AutoBackbone builds will do, as long as it yields maps (B, C, h, w); those of a plain ViT all have
    one stride, which works but is no pyramid.
    """

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__()
        self.conv_encoder = ConvEncoder(config)
        # Set by `optimize_for_inference` where it knows a faster way through this very backbone.
        self.fast_forward: Callable[[Tensor], list[Tensor]] | None = None

    @property
    def channels(self) -> list[int]:
        """Channels of each map."""
        return list(self.conv_encoder.model.channels)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to a list of (B, C_l, h_l, w_l), fine to coarse."""
        if is_exporting() and knows(self.conv_encoder.model):
            return export_forward(self.conv_encoder.model, pixel_values)
        if self.fast_forward is not None:
            return self.fast_forward(pixel_values)
        return list(self.conv_encoder.model(pixel_values).feature_maps)


def input_projections(channels: Sequence[int], num_levels: int, width: int) -> nn.ModuleList:
    """One projection per level to the model's width; levels beyond the backbone's are made by strided convolution.

    Args:
        channels: Channels of the backbone's maps, fine to coarse; the last num_levels of them are used.
        num_levels: Levels L.
        width: The model's width D.

    Returns:
        L projections, as `project` takes them.
    """

    def make(in_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(in_channels, width, kernel_size, stride, padding=kernel_size // 2)
        return nn.Sequential(convolution, nn.GroupNorm(math.gcd(32, width), width))

    used = channels[-num_levels:]
    extra = num_levels - len(used)
    projections = [make(n, 1) for n in used]
    projections += [make(used[-1] if index == 0 else width, 3, 2) for index in range(extra)]
    return nn.ModuleList(projections)


def project(backbone: Backbone, projections: nn.ModuleList, pixel_values: Tensor) -> list[Tensor]:
    """Backbone and projections.

    Args:
        backbone: The backbone.
        projections: L projections.
        pixel_values: (B, 3, H, W).

    Returns:
        L maps (B, D, h_l, w_l), fine to coarse.
    """
    maps = backbone(pixel_values)[-len(projections) :]
    features = [projection(x) for projection, x in zip(projections, maps, strict=False)]
    for index in range(len(maps), len(projections)):
        # The first extra level reads the backbone's last map, the others the level before.
        features.append(projections[index](maps[-1] if index == len(maps) else features[-1]))
    return features


def project_by_size(
    backbone: Backbone, projections: nn.ModuleList, pixel_values: Tensor, image_sizes: Sequence[tuple[int, int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The same for a padded batch, images of one size at a time, so that nothing ever sees the padding.

    Args:
        backbone: The backbone.
        projections: L projections.
        pixel_values: (B, 3, H, W), each image at the top left.
        image_sizes: (height, width) of each image.

    Returns:
        L maps (B, D, h_l, w_l), zero beyond an image, and L masks (B, h_l, w_l) bool, True on real cells.
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


def check_image_sizes(image_sizes: Sequence[tuple[int, int]], pixel_values: Tensor) -> bool:
    """Whether every image is as large as the batch.

    Args:
        image_sizes: (height, width) of each image.
        pixel_values: (B, 3, H, W).

    Returns:
        True if there is no padding.

    Raises:
        ValueError: There is not one size per image, or one is larger than the batch.
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
    """Which cells of a feature map are real.

    Args:
        pixel_mask: (B, H, W), nonzero on real pixels.
        size: (h, w) of the map.

    Returns:
        (B, h, w) bool, nearest neighbour.
    """
    return F.interpolate(pixel_mask[None].float(), size=size)[0].bool()
