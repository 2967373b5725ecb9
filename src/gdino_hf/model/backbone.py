"""Any AutoBackbone as a multi-level feature pyramid with masks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone

from .configuration_gdino import GDinoConfig


class FrozenBatchNorm2d(nn.Module):
    """Batch normalization by stored statistics that training never touches: detection batches are too small for it."""

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
        freeze_batch_norm(self.model)
        for name in unused_parameters(config):
            self.model.get_parameter(name).requires_grad_(False)


class Backbone(nn.Module):
    """Feature maps of an image and which of their cells are real.

    Any model that AutoBackbone builds will do, as long as it yields maps (B, C, h, w); those of a plain ViT all have
    one stride, which works but is no pyramid.
    """

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__()
        self.conv_encoder = ConvEncoder(config)

    @property
    def channels(self) -> list[int]:
        """Channels of each map."""
        return list(self.conv_encoder.model.channels)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to a list of (B, C_l, h_l, w_l), fine to coarse."""
        return list(self.conv_encoder.model(pixel_values).feature_maps)


def resize_mask(pixel_mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Which cells of a feature map are real.

    Args:
        pixel_mask: (B, H, W), nonzero on real pixels.
        size: (h, w) of the map.

    Returns:
        (B, h, w) bool, nearest neighbour.
    """
    return F.interpolate(pixel_mask[None].float(), size=size)[0].bool()
