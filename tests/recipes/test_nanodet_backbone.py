"""Conversion of the NanoDet graph: reading TensorFlow.js files, and the interpreter that is the reference."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gdino_hf.recipes.tensorflow_graph import read_graph, run_graph

# Both sides compute in float32, in another order.
ROUNDING = 1e-5


def node(name, op, inputs=(), **attributes):
    return {"name": name, "op": op, "input": list(inputs), "attr": attributes}


def string(text):
    import base64

    return {"s": base64.b64encode(text.encode()).decode()}


@pytest.fixture
def graph_file(tmp_path):
    """A graph of a padded convolution with bias, a leaky ReLU and a resize to twice the size; one kernel in 8 bits."""
    rng = np.random.default_rng(0)
    kernel = rng.integers(0, 256, (3, 3, 3, 4), dtype=np.uint8)
    tensors = {
        "kernel": kernel,
        "bias": rng.standard_normal(4).astype(np.float32),
        "sides": np.array([[0, 0], [1, 1], [1, 1], [0, 0]], dtype=np.int32),
        "to_last": np.array([0, 2, 3, 1], dtype=np.int32),
        "size": np.array([16, 16], dtype=np.int32),
    }
    weights = [{"name": name, "shape": list(x.shape), "dtype": str(x.dtype)} for name, x in tensors.items()]
    weights[0] |= {"dtype": "float32", "quantization": {"dtype": "uint8", "scale": 0.01, "min": -1.0}}
    (tmp_path / "weights.bin").write_bytes(b"".join(x.tobytes() for x in tensors.values()))
    strides = {"list": {"i": ["1", "1", "1", "1"]}}
    nodes = [
        node("input_1", "Placeholder"),
        *(node(name, "Const") for name in tensors),
        node("last", "Transpose", ["input_1", "to_last"]),
        node("padded", "Pad", ["last", "sides"]),
        node(
            "a/onnx_tf_prefix_conv",
            "Conv2D",
            ["padded", "kernel", "^last"],
            padding=string("VALID"),
            data_format=string("NHWC"),
            strides=strides,
        ),
        node("a/sum", "BiasAdd", ["a/onnx_tf_prefix_conv:0", "bias"]),
        node("a/relu", "LeakyRelu", ["a/sum"], alpha={"f": 0.1}),
        node(
            "a/large",
            "ResizeBilinear",
            ["a/relu", "size"],
            half_pixel_centers={"b": True},
            align_corners={"b": False},
        ),
    ]
    content = {
        "format": "graph-model",
        "modelTopology": {"node": nodes},
        "weightsManifest": [{"paths": ["weights.bin"], "weights": weights}],
    }
    (tmp_path / "graph.json").write_text(json.dumps(content))
    return tmp_path / "graph.json"


def test_constants_are_read_and_dequantized(graph_file):
    graph = read_graph(graph_file)
    assert graph.constants["kernel"].shape == (3, 3, 3, 4)
    assert -1 <= graph.constants["kernel"].min() < graph.constants["kernel"].max() <= 1.56
    assert graph.named("conv") == "a/onnx_tf_prefix_conv"
    assert graph.inputs("a/onnx_tf_prefix_conv") == ["padded", "kernel"]
    with pytest.raises(ValueError, match="0 nodes named nowhere"):
        graph.named("nowhere")


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 8)])
def test_interpreter_equals_torch(graph_file, height, width):
    graph = read_graph(graph_file)
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    (found,) = run_graph(graph, pixels, ["large"], traced_size=8)
    kernel = torch.from_numpy(graph.constants["kernel"]).permute(3, 2, 0, 1)
    expected = F.conv2d(pixels, kernel, torch.from_numpy(graph.constants["bias"].copy()), padding=1)
    expected = F.interpolate(F.leaky_relu(expected, 0.1), scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found.permute(0, 3, 1, 2), expected, rtol=0, atol=ROUNDING)


def test_weight_files_of_the_wrong_size_are_refused(graph_file):
    weights = graph_file.parent / "weights.bin"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="end inside size"):
        read_graph(graph_file)
    weights.write_bytes(whole + b"0")
    with pytest.raises(ValueError, match="describes"):
        read_graph(graph_file)
    graph_file.write_text(json.dumps({"format": "layers-model"}))
    with pytest.raises(ValueError, match="not 'graph-model'"):
        read_graph(graph_file)
