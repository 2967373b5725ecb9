"""Graphs that run: one interface over ONNX Runtime and OpenVINO."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from ..model.printable import printable
from .exported_folder import LIBRARIES, ExportedFolder, ExportError

_ONNX_TYPES = {
    **{f"tensor({name})": np.dtype(name) for name in ("int64", "int32", "bool", "float16")},
    "tensor(float)": np.dtype("float32"),
}


@dataclass(frozen=True)
class GraphInput:
    """An input of a graph.

    Attributes:
        dtype: Type of its values.
        shape: Length of each axis; None where any length is taken.
    """

    dtype: np.dtype
    shape: tuple[int | None, ...]


class Session(Protocol):
    """A graph, ready to run.

    Attributes:
        inputs: Its inputs by name.
    """

    inputs: Mapping[str, GraphInput]

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs by name from arrays for all inputs; several threads may call it."""
        ...


def open_sessions(folder: ExportedFolder, threads: int | None) -> dict[str, Session]:
    """Load the graphs of a folder.

    Args:
        folder: The folder.
        threads: Number of threads that one run uses; None leaves it to the library.

    Returns:
        A session for "model", or for "text" and "image".

    Raises:
        ExportError: The library is missing, too old, or refuses a file.
    """
    module = _library(folder)
    make: Any = _OnnxSession if folder.format == "onnx" else _OpenVinoSession
    found: dict[str, Session] = {}
    for role in ("model", "text", "image"):
        if role not in folder.files:
            continue
        try:
            found[role] = make(module, folder.files[role], threads)
        except Exception as error:  # both libraries raise exceptions of their own, OpenVINO plain RuntimeErrors
            why = printable(" ".join(str(error).split()), limit=200)
            raise ExportError(
                f"{module.__name__} {module.__version__} cannot load {printable(folder.files[role])} ({why}); update "
                f"{module.__name__}, or export the model again."
            ) from error
    return found


def _library(folder: ExportedFolder) -> ModuleType:
    name, extra = LIBRARIES[folder.format]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ExportError(f'{printable(folder.path)} needs {name}; pip install "gdino-hf[{extra}]".') from error
    if _numbers(module.__version__) < _numbers(folder.least_version):
        raise ExportError(
            f"{printable(folder.path)} needs {name} {folder.least_version} or newer, and {module.__version__} is "
            f"installed; pip install -U {name}."
        )
    return module


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers a version begins with, such as (2026, 4, 1) for "2026.4.1-123-abc"."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


class _OnnxSession:
    def __init__(self, onnxruntime: Any, file: Path, threads: int | None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        # Warnings of the library speak of its own optimizations.
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._outputs = [each.name for each in self._session.get_outputs()]
        self.inputs = {
            each.name: GraphInput(
                _ONNX_TYPES[each.type], tuple(length if isinstance(length, int) else None for length in each.shape)
            )
            for each in self._session.get_inputs()
        }

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(arrays)), strict=True))


class _OpenVinoSession:
    def __init__(self, openvino: Any, file: Path, threads: int | None) -> None:
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        self._model = openvino.Core().compile_model(str(file), "CPU", settings)
        self._names = [each.get_any_name() for each in self._model.outputs]
        self.inputs = {
            each.get_any_name(): GraphInput(
                np.dtype(each.get_element_type().to_dtype()),
                tuple(None if length.is_dynamic else length.get_length() for length in each.get_partial_shape()),
            )
            for each in self._model.inputs
        }

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        # A request of its own, because threads must not share one.
        request = self._model.create_infer_request()
        request.infer(dict(arrays))
        return {name: request.get_output_tensor(place).data.copy() for place, name in enumerate(self._names)}
