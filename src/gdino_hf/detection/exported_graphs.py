"""The graphs of an exported folder as functions of tensors, with the two formats that need torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .exported_folder import ExportedFolder
from .graph_sessions import TORCH_FREE, GraphInput, Maker, Session, open_sessions, run_graph


class ExportedGraph:
    """A graph, called with tensors by name.

    Args:
        session: The graph, ready to run.
        folder: Its folder.

    Attributes:
        inputs: Its inputs by name; an axis of any length is None.
    """

    def __init__(self, session: Session, folder: ExportedFolder) -> None:
        self._session, self._folder = session, folder
        self.inputs = session.inputs

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the outputs by name; tensors that the graph has no input for are left out."""
        arrays = {name: tensors[name].numpy().astype(port.dtype, copy=False) for name, port in self.inputs.items()}
        found = run_graph(self._session, arrays, self._folder)
        return {name: torch.from_numpy(value) for name, value in found.items()}


def load_graphs(folder: ExportedFolder) -> dict[str, ExportedGraph]:
    """Load the graphs of a folder in any format, for as many threads as torch uses.

    Args:
        folder: The exported folder.

    Returns:
        The graph of each role: "model", or "text" and "image".

    Raises:
        ExportError: The runtime is missing or too old, or refuses a file.
    """
    sessions = open_sessions(folder, torch.get_num_threads(), _SESSIONS)
    return {role: ExportedGraph(session, folder) for role, session in sessions.items()}


class _ExecutorchSession:
    def __init__(self, executorch: Any, file: Path, ports: Mapping[str, Any], threads: int | None) -> None:
        from executorch.runtime import Runtime

        self.inputs, self._outputs = _inputs(ports), list(ports["outputs"])
        self._method = Runtime.get().load_program(file).load_method("forward")

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = [torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in self.inputs]
        # The runtime writes the next results to the same memory.
        found = [value.numpy().copy() for value in self._method.execute(given)]
        return dict(zip(self._outputs, found, strict=True))


class _TorchExportSession:
    def __init__(self, library: Any, file: Path, ports: Mapping[str, Any], threads: int | None) -> None:
        self.inputs = _inputs(ports)
        self._module = torch.export.load(str(file)).module()

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            found = self._module(**{name: torch.from_numpy(arrays[name]) for name in self.inputs})
        return {name: value.numpy() for name, value in found.items()}


def _inputs(ports: Mapping[str, Any]) -> Mapping[str, GraphInput]:
    """Return the inputs that a document describes."""
    return {
        name: GraphInput(
            np.dtype(port["dtype"]), tuple(length if isinstance(length, int) else None for length in port["shape"])
        )
        for name, port in ports["inputs"].items()
    }


_SESSIONS: Mapping[str, Maker] = {**TORCH_FREE, "executorch": _ExecutorchSession, "torch-export": _TorchExportSession}
