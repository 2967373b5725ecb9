"""The small convolutional backbone of gdino-nano, as a transformers `AutoBackbone`.

A cross-stage-partial network (Wang et al. 2020, https://arxiv.org/abs/1911.11929) computes features at strides 4 to 32.
A path-aggregation pyramid (Liu et al. 2018, https://arxiv.org/abs/1803.01534), whose only convolutions are the lateral
ones, combines strides 8, 16 and 32. This is the architecture of the NanoDet detector's body, and
`recipes/nanodet_backbone.py` converts NanoDet's weights to this class. There are no normalization layers, since the
published weights have them folded into the convolutions; training and inference therefore compute the same function.

Pixels are RGB, normalized by the ImageNet mean and standard deviation like those of every Grounding DINO processor.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

# The pyramid reads the last three stages; the first stage (stride 4) only feeds the second.
NUM_STAGES = 4


class CspPanConfig(BackboneConfigMixin, PreTrainedConfig):
    """Architecture of a `CspPanBackbone`; the defaults are the published network with 3.3 M parameters.

    Args:
        num_channels: Number of image channels.
        stem_width: Number of channels after the first convolution.
        stage_widths: Number of channels inside each of the four stages, even; a stage outputs twice as many.
        stage_depths: Number of partial blocks in each of the four stages.
        pan_width: Number of channels of every pyramid level.
        negative_slope: Slope of the leaky ReLU below zero.
        head_features: Whether to append each level's head convolution to its map, which doubles the channels. The
            published detector computes class scores and boxes from the second half by one linear layer.
        out_features: Levels to return, out of "p3" (stride 8), "p4" (stride 16) and "p5" (stride 32); all by default.
        out_indices: Levels to return as indices from 0 to 2, instead of `out_features`.

    Raises:
        ValueError: `stage_widths` or `stage_depths` does not have four entries, or a stage width is not even.
    """

    model_type = "csp_pan"

    num_channels: int = 3
    stem_width: int = 32
    stage_widths: list[int] | tuple[int, ...] = (32, 64, 128, 256)
    stage_depths: list[int] | tuple[int, ...] = (1, 2, 2, 3)
    pan_width: int = 128
    negative_slope: float = 0.1
    head_features: bool = False

    def __post_init__(self, **kwargs):
        self.stage_widths, self.stage_depths = list(self.stage_widths), list(self.stage_depths)
        for name in ("stage_widths", "stage_depths"):
            if len(getattr(self, name)) != NUM_STAGES:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but there are {NUM_STAGES} stages: give one number per stage."
                )
        if any(width < 2 or width % 2 for width in self.stage_widths):
            raise ValueError(
                f"stage_widths is {self.stage_widths}, but a stage splits its channels in halves: give even numbers."
            )
        self.stage_names = ["p3", "p4", "p5"]
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if out_features is None and out_indices is None:
            out_features = list(self.stage_names)
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        super().__post_init__(**kwargs)


class ConvLeakyReLU(nn.Module):
    """A 3x3 convolution with bias and a leaky ReLU; stride 2 halves the size, rounding up."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, negative_slope: float):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1)
        self.negative_slope = negative_slope

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x), self.negative_slope)


class PartialBlock(nn.Module):
    """Two successive convolutions of half the width, whose outputs are concatenated, the second one first."""

    def __init__(self, width: int, *, negative_slope: float):
        super().__init__()
        self.first = ConvLeakyReLU(width, width // 2, negative_slope=negative_slope)
        self.second = ConvLeakyReLU(width // 2, width // 2, negative_slope=negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return torch.cat([self.second(first), first], dim=1)


class CspStage(nn.Module):
    """Entry convolution, partial blocks and exit convolution; the entry's output is also concatenated to the result."""

    def __init__(self, in_channels: int, width: int, depth: int, *, stride: int, negative_slope: float):
        super().__init__()
        self.entry = ConvLeakyReLU(in_channels, width, stride=stride, negative_slope=negative_slope)
        self.blocks = nn.ModuleList(PartialBlock(width, negative_slope=negative_slope) for _ in range(depth))
        self.exit = ConvLeakyReLU(width, width, negative_slope=negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        entry = x = self.entry(x)
        for block in self.blocks:
            x = block(x)
        return torch.cat([self.exit(x), entry], dim=1)


class PathAggregation(nn.Module):
    """1x1 lateral convolutions, then sums of bilinearly resized maps, from coarse to fine and back."""

    def __init__(self, in_channels: list[int], width: int):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(channels, width, kernel_size=1) for channels in in_channels)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        # Each map is resized to the size of its neighbour, so sides need not be multiples of the strides.
        for i in range(len(maps) - 2, -1, -1):
            maps[i] = maps[i] + resize_to(maps[i + 1], maps[i])
        for i in range(1, len(maps)):
            maps[i] = maps[i] + resize_to(maps[i - 1], maps[i])
        return maps


def resize_to(x: Tensor, like: Tensor) -> Tensor:
    """Resize `x` bilinearly to the height and width of `like`, with unaligned corners and no antialiasing."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class CspPanBackbone(BackboneMixin, PreTrainedModel):
    """CSP network with a path-aggregation pyramid: three feature maps of equal width at strides 8, 16 and 32.

    An image side of n pixels gives ceil(n / stride) cells, for any n. Padded pixels count as zeros; masks are up to
    the caller.

    Args:
        config: The architecture.
    """

    config_class = CspPanConfig
    config: CspPanConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    has_attentions = False
    _supports_sdpa = True  # it has no attention, so any implementation suits it

    def __init__(self, config: CspPanConfig):
        super().__init__(config)
        width = config.pan_width * (2 if config.head_features else 1)
        self.num_features = [width] * len(config.stage_names)
        slope = config.negative_slope
        self.stem = ConvLeakyReLU(config.num_channels, config.stem_width, stride=2, negative_slope=slope)
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        stages, in_channels = [], config.stem_width
        for i, (width, depth) in enumerate(zip(config.stage_widths, config.stage_depths, strict=True)):
            stages.append(CspStage(in_channels, width, depth, stride=1 if i == 0 else 2, negative_slope=slope))
            in_channels = 2 * width
        self.stages = nn.ModuleList(stages)
        self.pan = PathAggregation([2 * width for width in config.stage_widths[1:]], config.pan_width)
        if config.head_features:
            self.heads = nn.ModuleList(
                ConvLeakyReLU(config.pan_width, config.pan_width, negative_slope=slope) for _ in config.stage_names
            )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            # Lateral convolutions have no activation (slope 1); the others preserve variance through the leaky ReLU.
            slope = 1.0 if module.kernel_size == (1, 1) else self.config.negative_slope
            init.kaiming_normal_(module.weight, a=slope, nonlinearity="leaky_relu")
            init.zeros_(module.bias)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BackboneOutput | tuple:
        """Compute the feature maps of the configured levels, fine to coarse.

        Args:
            pixel_values: (B, num_channels, H, W) RGB pixels, normalized by the ImageNet statistics.
            output_hidden_states: Whether to return the maps before the pyramid too, at strides 4 (stem), 4, 8, 16 and
                32; `config.output_hidden_states` by default.
            return_dict: Whether to return a `BackboneOutput` and not a tuple; `config.return_dict` by default.
            **kwargs: Ignored; other backbones accept more arguments.

        Returns:
            `BackboneOutput` whose `feature_maps` has one (B, C, ceil(H / stride), ceil(W / stride)) tensor per entry of
            `config.out_features`. C is `pan_width`, or twice that with `head_features`. `hidden_states` is a tuple of
            maps if requested, else None.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        x = self.pool(self.stem(pixel_values))
        hidden_states = [x]
        for stage in self.stages:
            x = stage(x)
            hidden_states.append(x)
        maps = self.pan(hidden_states[2:])
        if self.config.head_features:
            maps = [torch.cat([x, head(x)], dim=1) for x, head in zip(maps, self.heads, strict=True)]
        pyramid = dict(zip(self.stage_names, maps, strict=True))
        output = BackboneOutput(
            feature_maps=tuple(pyramid[name] for name in self.out_features),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()


AutoConfig.register("csp_pan", CspPanConfig, exist_ok=True)
AutoBackbone.register(CspPanConfig, CspPanBackbone, exist_ok=True)
