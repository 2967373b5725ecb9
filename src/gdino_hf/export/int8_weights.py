"""Graphs whose weights are int8, through NNCF: which layers a graph has, and how it is written with some in float.

Each output channel of a weight, and each row of an embedding, has its own scale and zero point. Activations stay in
float: with int8 activations too few boxes stay in place, see docs/exporting.md.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ONNX_OPERATORS = ("MatMul", "Gemm", "Gather", "Conv")
# ONNX Runtime refuses the scales that NNCF writes for convolutions, which have as many axes as the weights.
_ONNX_AXES = 2
_OPENVINO_OPERATORS = ("MatMul", "Convolution", "GroupConvolution", "Gather")
_SMALLEST = 1024
"""Number of weights below which a layer stays in float: its scales would take more than int8 saves."""


@dataclass(frozen=True)
class Layers:
    """The layers of a graph that have weights, in the order in which they run.

    Attributes:
        int8: Names of those that can be int8.
        float_only: Names of those that stay in float whatever is measured.
        products: Names of products of two activations, which have no weights although NNCF looks for some.
    """

    int8: tuple[str, ...]
    float_only: tuple[str, ...]
    products: tuple[str, ...] = ()


def find_layers(path: Path) -> Layers:
    """Return the layers of a graph.

    Args:
        path: model.onnx or openvino_model.xml, in float.
    """
    return (_onnx_layers if path.suffix == ".onnx" else _openvino_layers)(path)


def write_int8(source: Path, target: Path, kept: Collection[str]) -> None:
    """Write a graph with the weights of its layers in int8.

    Args:
        source: model.onnx or openvino_model.xml, in float.
        target: Where to, with the same ending; OpenVINO's .bin is written beside it.
        kept: Names of layers that stay in float, besides those that can be nothing else.

    Raises:
        ValueError: NNCF cannot change the graph.
    """
    import nncf

    layers = find_layers(source)
    ignored = nncf.IgnoredScope(names=[*layers.float_only, *layers.products, *kept], validate=False)

    def compress(model: Any) -> Any:
        try:
            return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=ignored)
        # NNCF raises exceptions of many types.
        except Exception as error:
            raise ValueError(
                f"NNCF cannot write the weights of {source.name} in int8 ({error}); export in float."
            ) from error

    with _quiet():
        (_write_onnx if source.suffix == ".onnx" else _write_openvino)(source, target, compress)


def _onnx_layers(path: Path) -> Layers:
    import onnx

    graph = onnx.load(str(path)).graph
    weights = {each.name: each for each in graph.initializer}
    int8: list[str] = []
    float_only: list[str] = []
    products: list[str] = []
    for node in graph.node:
        if node.op_type not in _ONNX_OPERATORS:
            continue
        own = next((weights[name] for name in node.input[:2] if name in weights), None)
        if own is None or own.data_type != onnx.TensorProto.FLOAT:
            products.append(node.name)
            continue
        fits = node.op_type != "Conv" and len(own.dims) == _ONNX_AXES and _count(own.dims) >= _SMALLEST
        (int8 if fits else float_only).append(node.name)
    return Layers(tuple(int8), tuple(float_only), tuple(products))


def _openvino_layers(path: Path) -> Layers:
    import openvino

    int8: list[str] = []
    float_only: list[str] = []
    for node in openvino.Core().read_model(str(path)).get_ordered_ops():
        if node.get_type_name() not in _OPENVINO_OPERATORS:
            continue
        weight = next(
            (w for w in (each.get_source_output().get_node() for each in node.inputs()[:2]) if _is_weight(w)), None
        )
        if weight is None:
            continue
        fits = _count(weight.get_output_shape(0)) >= _SMALLEST
        (int8 if fits else float_only).append(node.get_friendly_name())
    return Layers(tuple(int8), tuple(float_only))


def _is_weight(node: Any) -> bool:
    return node.get_type_name() == "Constant" and node.get_element_type().is_real()


def _count(shape: Any) -> int:
    count = 1
    for length in shape:
        count *= int(length)
    return count


def _write_onnx(source: Path, target: Path, compress: Callable[[Any], Any]) -> None:
    import onnx

    onnx.save(compress(onnx.load(str(source))), str(target))


def _write_openvino(source: Path, target: Path, compress: Callable[[Any], Any]) -> None:
    import openvino

    model = compress(openvino.Core().read_model(str(source)))
    openvino.save_model(model, str(target), compress_to_fp16=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's progress bars and remarks off the screen; errors are raised."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
