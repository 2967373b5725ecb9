"""Weights in half precision: fewer bytes, and the same results to the bit."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from gdino_hf.export.half_weights import halve_weights


def linear_model(weight, bias):
    """Return x @ weight + bias as an ONNX model."""
    tensors = [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")]
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in ("x", "y")]
    listed = [helper.make_tensor_value_info("weight", TensorProto.FLOAT, weight.shape)]
    graph = helper.make_graph(nodes, "linear", ends[:1], ends[1:], tensors, value_info=listed)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def result(model, x):
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e6], ids=["whole", "too small", "too large"])
def test_only_weights_that_lose_nothing_are_halved(scale):
    generator = np.random.default_rng(0)
    whole = generator.normal(size=(64, 32)).astype(np.float16).astype(np.float32) * np.float32(scale)
    model = linear_model(whole, generator.normal(size=32).astype(np.float32))
    x = generator.normal(size=(3, 64)).astype(np.float32)
    before = result(model, x)
    saved = halve_weights(model)
    onnx.checker.check_model(model, full_check=True)
    assert saved == (whole.nbytes // 2 if scale == 1.0 else 0)
    assert np.array_equal(result(model, x), before)


def test_one_number_that_loses_something_keeps_its_tensor():
    weight = np.ones((64, 32), np.float32)
    weight[5, 5] = 1 + 2**-20
    model = linear_model(weight, np.zeros(32, np.float32))
    assert halve_weights(model) == 0
    assert {tensor.data_type for tensor in model.graph.initializer} == {TensorProto.FLOAT}
