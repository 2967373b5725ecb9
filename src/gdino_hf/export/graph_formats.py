"""From a traced graph to files: each format through transformers.exporters, and where we do more than they.

What differs from a plain call of their exporters, and why:

- All of them: the axes of batch, image and text are named dynamic; every other axis is fixed. Their own `dynamic=True`
  would try to make the channels dynamic, too.
- ONNX: weights up to `_ONE_FILE` are inside the file, because browsers and many servers take one file; they always
  write a second one. The names of Python modules and lines, which make up most of the graph's bytes, are left out.
- ExecuTorch: the graph has fixed sizes, see `STATIC`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_impls import get_fast_op_impls

from .graphs import GraphPlan

OPSET = 20
"""Version of ONNX's operators: the first with Gelu, which ONNX Runtime has since 1.17."""
STATIC = frozenset({"executorch"})
"""Formats whose graphs have the sizes of the example: ExecuTorch plans its memory when the graph is made."""

RUNTIMES = {
    "onnx": {"name": "onnxruntime", "least_version": "1.20"},
    "openvino": {"name": "openvino", "least_version": "2025.0"},
    "executorch": {"name": "executorch", "least_version": "1.0"},
    "torch-export": {"name": "torch", "least_version": "2.13"},
}
_PACKAGES = {
    "onnx": ("onnx", "onnxscript"),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "torch-export": (),
    "int8": ("nncf", "onnx", "onnxruntime", "openvino"),
}
# A protobuf file ends at 2 GiB.
_ONE_FILE = 1_900_000_000


def check_packages(model_format: str) -> None:
    """Raise an error if a package that writes this format is not installed.

    Args:
        model_format: "onnx", "openvino", "executorch" or "torch-export", or "int8" for what int8 weights need.

    Raises:
        ValueError: A package is missing.
    """
    for package in _PACKAGES[model_format]:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            extra = "executorch" if package == "executorch" else "export"
            raise ValueError(f'{model_format} needs the package {package}: pip install "gdino-hf[{extra}]".') from None


def write_graph(plan: GraphPlan, model_format: str, folder: Path) -> dict[str, Path]:
    """Trace a graph and write it.

    Args:
        plan: The graph.
        model_format: "onnx", "openvino", "executorch" or "torch-export".
        folder: Where the files go.

    Returns:
        The files by role: the plan's own, and for weights in a second file the same with "_weights".
    """
    with _quiet(), _sampled_sizes():
        return _WRITERS[model_format](plan, folder)


def _write_onnx(plan: GraphPlan, folder: Path) -> dict[str, Path]:
    import onnx_ir
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    config = OnnxConfig(dynamic_shapes=plan.dynamic_shapes(), opset_version=OPSET)
    program = OnnxExporter().export(plan.module, dict(plan.inputs), config).program
    _strip(program)
    path = folder / f"{plan.role}.onnx"
    size = sum(value.const_value.nbytes for value in program.graph.initializers.values() if value.const_value)
    if size <= _ONE_FILE:
        onnx_ir.save(program, str(path))
        return {plan.role: path}
    onnx_ir.save(program, str(path), external_data=f"{path.name}.data")
    return {plan.role: path, f"{plan.role}_weights": folder / f"{path.name}.data"}


def _strip(program: Any) -> None:
    for graph in program.graphs():
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()


def _write_openvino(plan: GraphPlan, folder: Path) -> dict[str, Path]:
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    config = OpenVINOConfig(dynamic_shapes=plan.dynamic_shapes())
    program = OpenVINOExporter().export(plan.module, dict(plan.inputs), config).program
    path = folder / f"openvino_{plan.role}.xml"
    OpenVINOExporter.save_program(program, path)
    return {plan.role: path, f"{plan.role}_weights": path.with_suffix(".bin")}


def _write_executorch(plan: GraphPlan, folder: Path) -> dict[str, Path]:
    from transformers.exporters.exporter_executorch import ExecutorchConfig, ExecutorchExporter

    program = ExecutorchExporter().export(plan.module, dict(plan.inputs), ExecutorchConfig(backend="xnnpack")).program
    path = folder / f"{plan.role}.pte"
    ExecutorchExporter.save_program(program, path)
    return {plan.role: path}


def _write_torch_export(plan: GraphPlan, folder: Path) -> dict[str, Path]:
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    config = DynamoConfig(dynamic_shapes=plan.dynamic_shapes())
    program = DynamoExporter().export(plan.module, dict(plan.inputs), config).program
    path = folder / f"{plan.role}.pt2"
    DynamoExporter.save_program(program, path)
    return {plan.role: path}


_WRITERS: dict[str, Callable[[GraphPlan, Path], dict[str, Path]]] = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "executorch": _write_executorch,
    "torch-export": _write_torch_export,
}


@contextlib.contextmanager
def _sampled_sizes() -> Iterator[None]:
    """Tell the tracer the size of what grid_sample returns.

    With dynamic sizes PyTorch finds it by tracing a decomposition of some sixty operators at every call, which takes a
    quarter of the whole export.
    """
    known = get_fast_op_impls()
    sample = torch.ops.aten.grid_sampler_2d.default

    def sampled(mode: Any, values: Tensor, grid: Tensor, *settings: Any) -> Tensor:
        with mode:
            return values.new_empty(*values.shape[:2], *grid.shape[1:3])

    before = known.get(sample)
    known[sample] = sampled
    try:
        yield
    finally:
        del known[sample]
        if before is not None:
            known[sample] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress lines and remarks about their own versions off the screen; errors are raised."""
    loggers = [
        logging.getLogger(name) for name in ("transformers", "torch.onnx", "torch.export", "torch.utils._pytree")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
