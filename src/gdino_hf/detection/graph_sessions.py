"""Graphs that run: one interface over runtimes, and those of ONNX Runtime and OpenVINO. No torch."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Callable, Mapping
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


Maker = Callable[[Any, Path, Mapping[str, Any], int | None], Session]
"""Loads a graph, from its library, its file, what the document says of it, and the number of threads or None."""


def open_sessions(
    folder: ExportedFolder, threads: int | None, makers: Mapping[str, Maker] | None = None
) -> dict[str, Session]:
    """Load the graphs of a folder.

    Args:
        folder: The folder.
        threads: Number of threads that one run uses; None leaves it to the library.
        makers: What loads a graph of each format; None for `TORCH_FREE`.

    Returns:
        A session for "model", or for "text" and "image".

    Raises:
        ExportError: The format needs torch, or the library is missing, too old, or refuses a file.
    """
    makers = TORCH_FREE if makers is None else makers
    if folder.format not in makers:
        raise ExportError(
            f"{printable(folder.path)} holds a model in the format {folder.format!r}, which needs torch; open it with "
            f"gdino_hf.Detector, or export it again with --format {' or '.join(makers)}."
        )
    module, version = _library(folder)
    found: dict[str, Session] = {}
    for role in ("model", "text", "image"):
        if role not in folder.files:
            continue
        try:
            found[role] = makers[folder.format](module, folder.files[role], folder.graphs.get(role, {}), threads)
        except Exception as error:  # the libraries raise exceptions of their own, OpenVINO plain RuntimeErrors
            why = printable(" ".join(str(error).split()), limit=200)
            name = LIBRARIES[folder.format][0]
            raise ExportError(
                f"{name} {version} cannot load {printable(folder.files[role])} ({why}); update {name}, or export the "
                "model again."
            ) from error
    return found


def run_graph(session: Session, arrays: Mapping[str, np.ndarray], folder: ExportedFolder) -> dict[str, np.ndarray]:
    """Run a graph of a folder.

    Args:
        session: The graph.
        arrays: Its inputs by name.
        folder: The folder, for messages.

    Returns:
        The outputs by name.

    Raises:
        ExportError: The library refuses the inputs: a graph may not take every size.
    """
    try:
        return session.run(arrays)
    except Exception as error:  # see `open_sessions`
        sizes = ", ".join(f"{name} {'x'.join(map(str, value.shape))}" for name, value in arrays.items())
        why = printable(" ".join(str(error).split()), limit=120)
        raise ExportError(
            f"{printable(folder.path)} cannot take these sizes: {sizes} ({why}); give a picture that is less narrow, "
            "or export the model in the format onnx."
        ) from error


def _library(folder: ExportedFolder) -> tuple[ModuleType, str]:
    """Return the library that runs a folder, and its version."""
    name, extra = LIBRARIES[folder.format]
    try:
        module = importlib.import_module(name)
        version = str(getattr(module, "__version__", None) or importlib.metadata.version(name))
    except ModuleNotFoundError as error:  # metadata's PackageNotFoundError is one, too
        raise ExportError(f'{printable(folder.path)} needs {name}; pip install "gdino-hf[{extra}]".') from error
    except ImportError as error:
        raise ExportError(
            f"{printable(folder.path)} needs {name}, which is installed and cannot be imported "
            f"({printable(error, limit=100)}); pip install --force-reinstall {name}."
        ) from error
    if _numbers(version) < _numbers(folder.least_version):
        raise ExportError(
            f"{printable(folder.path)} needs {name} {folder.least_version} or newer, and {version} is installed; "
            f"pip install -U {name}."
        )
    return module, version


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers a version begins with, such as (2026, 4, 1) for "2026.4.1-123-abc"."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


class _OnnxSession:
    def __init__(self, onnxruntime: Any, file: Path, ports: Mapping[str, Any], threads: int | None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        # Warnings of the library speak of its own optimizations.
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._outputs = [each.name for each in self._session.get_outputs()]
        self.inputs: Mapping[str, GraphInput] = {
            each.name: GraphInput(
                _ONNX_TYPES[each.type], tuple(length if isinstance(length, int) else None for length in each.shape)
            )
            for each in self._session.get_inputs()
        }

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(arrays)), strict=True))


class _OpenVinoSession:
    def __init__(self, openvino: Any, file: Path, ports: Mapping[str, Any], threads: int | None) -> None:
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        self._model = openvino.Core().compile_model(str(file), "CPU", settings)
        self._names = [each.get_any_name() for each in self._model.outputs]
        self.inputs: Mapping[str, GraphInput] = {
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


TORCH_FREE: Mapping[str, Maker] = {"onnx": _OnnxSession, "openvino": _OpenVinoSession}
"""What loads a graph of each format that runs without torch."""
