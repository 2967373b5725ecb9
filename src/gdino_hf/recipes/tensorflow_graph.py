"""TensorFlow.js graph models: reading one without TensorFlow, and executing it node by node.

The interpreter knows the operators of the NanoDet export only. It is the reference that the converted backbone is
compared with.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Names of the exporter's placeholder and of the prefix it puts before some node names.
INPUT = "input_1"
_PREFIX = "onnx_tf_prefix_"


@dataclass(frozen=True)
class Graph:
    """A graph model.

    Attributes:
        nodes: Nodes as the file describes them, by name.
        constants: Values of the constant nodes, by name.
    """

    nodes: dict[str, dict[str, Any]]
    constants: dict[str, np.ndarray]

    def named(self, short: str) -> str:
        """Return the full name of the one node whose path ends in `short`, ignoring the exporter's prefix."""
        found = [name for name in self.nodes if name.split("/")[-1].removeprefix(_PREFIX) == short]
        if len(found) != 1:
            raise ValueError(f"The graph has {len(found)} nodes named {short}, not 1: this is not the NanoDet export.")
        return found[0]

    def inputs(self, name: str) -> list[str]:
        """Return the names of a node's inputs, without control edges."""
        edges = self.nodes[name].get("input", [])
        return [edge.removesuffix(":0") for edge in edges if not edge.startswith("^")]


def read_graph(path: str | Path) -> Graph:
    """Read a graph model and the weight files that it names.

    Args:
        path: The JSON file; its weight files lie beside it.

    Returns:
        The graph.

    Raises:
        ValueError: The file is not a TensorFlow.js graph model, or its weight files have the wrong size.
    """
    path = Path(path)
    model = json.loads(path.read_text(encoding="utf-8"))
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
                raise ValueError(f"The weight files of {path} end inside {weight['name']}: download them again.")
            value = np.frombuffer(buffer, dtype, count, offset).reshape(weight["shape"]).astype(weight["dtype"])
            if "scale" in packing:
                value = value * np.float32(packing["scale"]) + np.float32(packing["min"])
            constants[weight["name"]] = value
            offset += count * dtype.itemsize
        if offset != len(buffer):
            raise ValueError(
                f"The weight files of {path} have {len(buffer)} bytes, but the JSON file describes {offset}: download "
                "them again."
            )
    return Graph({node["name"]: node for node in model["modelTopology"]["node"]}, constants)


def run_graph(graph: Graph, pixels: Tensor, outputs: list[str], traced_size: int) -> list[Tensor]:
    """Execute a graph up to the named nodes, with each operator as TensorFlow defines it.

    Args:
        graph: Graph from `read_graph`.
        pixels: (B, 3, H, W), normalized as the graph expects.
        outputs: Short names of the nodes to compute.
        traced_size: Height and width in pixels that the graph was traced with. Resize targets are constants for that
            size, so they are scaled by H / traced_size and W / traced_size.

    Returns:
        One tensor per entry of `outputs`, in the layout that the node has.
    """
    values: dict[str, Tensor] = {graph.named(INPUT): pixels}
    scale = (pixels.shape[2] / traced_size, pixels.shape[3] / traced_size)

    def evaluate(name: str) -> Tensor:
        if name not in values:
            values[name] = _apply(graph, name, evaluate, scale)
        return values[name]

    # Python's recursion limit is not reached: the graph is a hundred operators deep, at two calls for each.
    return [evaluate(graph.named(name)) for name in outputs]


def _apply(graph: Graph, name: str, evaluate: Callable[[str], Tensor], scale: tuple[float, float]) -> Tensor:
    """Compute one node from its inputs."""
    node, inputs = graph.nodes[name], graph.inputs(name)
    op = node["op"]
    if op == "Const":
        return torch.from_numpy(np.array(graph.constants[name]))
    if op in ("Add", "AddV2", "BiasAdd"):
        return evaluate(inputs[0]) + evaluate(inputs[1])
    if op == "Transpose":
        return evaluate(inputs[0]).permute(*graph.constants[inputs[1]].tolist())
    if op in ("Pad", "PadV2"):
        sides = [int(n) for pair in graph.constants[inputs[1]][::-1] for n in pair]
        value = float(graph.constants[inputs[2]]) if op == "PadV2" else 0.0
        return F.pad(evaluate(inputs[0]), sides, value=value)
    if op == "LeakyRelu":
        return F.leaky_relu(evaluate(inputs[0]), _attribute(node, "alpha"))
    if op == "ConcatV2":
        return torch.cat([evaluate(each) for each in inputs[:-1]], dim=int(graph.constants[inputs[-1]]))
    if op in ("Conv2D", "MaxPool"):
        return _convolve_or_pool(node, inputs, evaluate)
    if op == "ResizeBilinear":
        if not _attribute(node, "half_pixel_centers") or _attribute(node, "align_corners"):
            raise ValueError(f"{name} does not use half-pixel centers, which is the only grid implemented here.")
        x = evaluate(inputs[0])
        height, width = (round(int(n) * s) for n, s in zip(graph.constants[inputs[1]], scale, strict=True))
        rows, columns = _bilinear_weights(x.shape[1], height), _bilinear_weights(x.shape[2], width)
        return torch.einsum("yh,xw,bhwc->byxc", rows, columns, x)
    raise ValueError(f"{name} is a {op}, which the interpreter does not implement.")


def _convolve_or_pool(node: dict[str, Any], inputs: list[str], evaluate: Callable[[str], Tensor]) -> Tensor:
    """Compute a Conv2D or MaxPool node; TensorFlow has channels last, in images and in kernels."""
    if _attribute(node, "padding") != "VALID" or _attribute(node, "data_format") != "NHWC":
        raise ValueError(f"{node['name']} is not VALID and NHWC, which is the only {node['op']} implemented here.")
    x = evaluate(inputs[0]).permute(0, 3, 1, 2)
    stride = _attribute(node, "strides")[1:3]
    if node["op"] == "Conv2D":
        x = F.conv2d(x, evaluate(inputs[1]).permute(3, 2, 0, 1), stride=stride)
    else:
        x = F.max_pool2d(x, _attribute(node, "ksize")[1:3], stride)
    return x.permute(0, 2, 3, 1)


def _bilinear_weights(size_in: int, size_out: int) -> Tensor:
    """(size_out, size_in) matrix of TensorFlow's bilinear interpolation with half-pixel centers along one axis."""
    weights = torch.zeros(size_out, size_in)
    for i in range(size_out):
        position = (i + 0.5) * size_in / size_out - 0.5
        lower = int(np.floor(position))
        weights[i, max(lower, 0)] += 1 - (position - lower)
        weights[i, min(lower + 1, size_in - 1)] += position - lower
    return weights


def _attribute(node: dict[str, Any], name: str) -> Any:
    """Return a node's attribute as a Python value."""
    ((kind, value),) = node["attr"][name].items()
    if kind == "s":
        return base64.b64decode(value).decode()
    if kind == "list":
        return [int(n) for n in value.get("i", [])]
    return value
