"""ONNX files: reading the nodes and the stored tensors of one without the onnx package.

An ONNX file is one message in the wire format of protocol buffers: fields of a number and a kind, whose meaning the
schema (onnx.proto) gives. The numbers below are those of the schema.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DTYPES = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
}
# Fields of ModelProto, GraphProto, NodeProto, AttributeProto and TensorProto that are read here.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_KIND, _NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_FLOAT, _ATTRIBUTE_TENSOR = 1, 2, 5
_TENSOR_DIMS, _TENSOR_DTYPE, _TENSOR_FLOATS, _TENSOR_INTS, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 4, 7, 8, 9


@dataclass
class Node:
    """One operation of a graph.

    Attributes:
        kind: Name of the operator, such as "MatMul".
        name: Name of the node.
        inputs: Names of the values it reads.
        outputs: Names of the values it makes.
        attributes: Floats and tensors by name; attributes of other kinds are left out.
    """

    kind: str = ""
    name: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class OnnxGraph:
    """The graph of an ONNX file.

    Attributes:
        nodes: Operations in order.
        tensors: Stored tensors by name.
    """

    nodes: list[Node]
    tensors: dict[str, np.ndarray]


def read_onnx(path: str | Path) -> OnnxGraph:
    """Read an ONNX file whose tensors are stored inside it.

    Args:
        path: The file.

    Returns:
        Its graph.

    Raises:
        ValueError: The file is not an ONNX file, or a tensor is stored elsewhere or in a dtype that numpy lacks.
    """
    try:
        graph = next(value for number, value in _fields(Path(path).read_bytes()) if number == _MODEL_GRAPH)
        fields = list(_fields(graph))
        nodes = [_node(value) for number, value in fields if number == _GRAPH_NODE]
        tensors = dict(_tensor(value) for number, value in fields if number == _GRAPH_INITIALIZER)
    except (StopIteration, IndexError, TypeError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f"{path} is not an ONNX file; fetch it again.") from error
    return OnnxGraph(nodes, tensors)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a message: an integer, four or eight bytes, or the bytes of a field."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if kind == _BYTES:
            length, position = _varint(data, position)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise IndexError(f"a field of the kind {kind}")
        if position + length > len(data):
            raise IndexError("a field that ends after the message")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Read an integer of seven bits a byte, and return it with the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        shift, position = shift + 7, position + 1
        if byte < 128:
            return value, position


def _node(data: bytes) -> Node:
    node = Node()
    for number, value in _fields(data):
        if number == _NODE_INPUT:
            node.inputs.append(value.decode())
        elif number == _NODE_OUTPUT:
            node.outputs.append(value.decode())
        elif number == _NODE_NAME:
            node.name = value.decode()
        elif number == _NODE_KIND:
            node.kind = value.decode()
        elif number == _NODE_ATTRIBUTE:
            fields = dict(_fields(value))
            name = fields[_ATTRIBUTE_NAME].decode()
            if _ATTRIBUTE_FLOAT in fields:
                node.attributes[name] = struct.unpack("<f", fields[_ATTRIBUTE_FLOAT])[0]
            elif _ATTRIBUTE_TENSOR in fields:
                node.attributes[name] = _tensor(fields[_ATTRIBUTE_TENSOR])[1]
    return node


def _tensor(data: bytes) -> tuple[str, np.ndarray]:
    """Read a tensor and its name."""
    name, shape, kind, values = "", [], 0, np.zeros(0, np.float32)
    for number, value in _fields(data):
        if number == _TENSOR_DIMS:
            shape += _integers(value)
        elif number == _TENSOR_DTYPE:
            kind = value
        elif number == _TENSOR_NAME:
            name = value.decode()
        elif number == _TENSOR_RAW:
            values = np.frombuffer(value, np.uint8)
        elif number == _TENSOR_FLOATS:
            values = np.append(values, np.frombuffer(value, "<f4"))
        elif number == _TENSOR_INTS:
            values = np.append(values.astype(np.int64), _integers(value))
    if kind not in _DTYPES:
        raise ValueError(f"The tensor {name!r} is stored in the dtype {kind} of ONNX; export the model in float32.")
    values = values.view(_DTYPES[kind]) if values.dtype == np.uint8 else values.astype(_DTYPES[kind])
    if values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"The tensor {name!r} is not stored inside the file; export the model into one file.")
    return name, values.reshape(shape)


def _integers(value: int | bytes) -> list[int]:
    """Return the integers of a repeated field, which holds one or, packed, several."""
    if isinstance(value, int):
        return [value]
    numbers, position = [], 0
    while position < len(value):
        number, position = _varint(value, position)
        numbers.append(number - 2**64 if number >= 2**63 else number)
    return numbers
