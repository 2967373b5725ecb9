"""The graphs of an exported folder: its document and files are checked, then a runtime loads each graph."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DOCUMENT = "gdino_export.json"
FORMAT_VERSION = 1

Graph = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def is_exported(folder: str | Path) -> bool:
    """Return whether a folder was written by `gdino_hf.export.export`."""
    return (Path(folder) / DOCUMENT).is_file()


def read_document(folder: Path) -> dict[str, Any]:
    """Read gdino_export.json and check that all files are there and whole.

    Args:
        folder: The exported folder.

    Returns:
        The document.

    Raises:
        ValueError: The document cannot be read or is of a later version, or a file is missing, cut off or changed.
    """
    try:
        content = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
        version, files = content["format_version"], content["files"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / DOCUMENT} cannot be read; export the model again.") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder / DOCUMENT} has version {version} but this gdino-hf reads {FORMAT_VERSION}; update gdino-hf or "
            "export the model again."
        )
    for entry in files:
        path = folder / Path(entry["name"]).name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise ValueError(
                f"{path} {found} but should have {entry['bytes']:,}; copy the folder or export the model again."
            )
        if _sha256(path) != entry["sha256"]:
            raise ValueError(f"{path} was changed since it was exported; copy the folder or export the model again.")
    return content


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def check_runtime(name: str, least_version: str) -> None:
    """Check that the library that runs a folder's graphs is installed and recent enough.

    Args:
        name: The library's name on the package index.
        least_version: The earliest version that will do, such as "1.20".

    Raises:
        ValueError: It is missing or too old.
    """
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f'The folder needs {name} {least_version} or later: pip install "{name}".') from None
    if _numbers(version) < _numbers(least_version):
        raise ValueError(
            f"The folder needs {name} {least_version} or later but {version} is installed: "
            f'pip install --upgrade "{name}".'
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def load_graphs(folder: Path, content: Mapping[str, Any]) -> dict[str, Graph]:
    """Load the graphs of a folder.

    Args:
        folder: The exported folder.
        content: Its document.

    Returns:
        A function for each graph, by role, from the tensors of its inputs by name to those of its outputs.

    Raises:
        ValueError: The runtime is missing or too old, or refuses a file.
    """
    check_runtime(content["runtime"]["name"], content["runtime"]["least_version"])
    load = _LOADERS[content["format"]]
    return {
        role: load(folder / Path(content["files"][role]["name"]).name, ports)
        for role, ports in content["graphs"].items()
    }


def _load_onnx(path: Path, ports: Mapping[str, Any]) -> Graph:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = list(ports["outputs"])

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = session.run(names, {name: inputs[name].numpy() for name in ports["inputs"]})
        return {name: torch.from_numpy(value) for name, value in zip(names, outputs, strict=True)}

    return run


def _load_openvino(path: Path, ports: Mapping[str, Any]) -> Graph:
    import openvino

    # Some processors would compute in bfloat16 otherwise.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(torch.get_num_threads())}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = compiled({name: inputs[name].numpy() for name in ports["inputs"]})
        return {name: torch.from_numpy(outputs[name].copy()) for name in ports["outputs"]}

    return run


def _load_executorch(path: Path, ports: Mapping[str, Any]) -> Graph:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = method.execute([inputs[name].contiguous() for name in ports["inputs"]])
        # The runtime writes the next results to the same memory.
        return {name: value.clone() for name, value in zip(ports["outputs"], outputs, strict=True)}

    return run


def _load_torch_export(path: Path, ports: Mapping[str, Any]) -> Graph:
    module = torch.export.load(str(path)).module()
    return lambda inputs: module(**{name: inputs[name] for name in ports["inputs"]})


_LOADERS: dict[str, Callable[[Path, Mapping[str, Any]], Graph]] = {
    "onnx": _load_onnx,
    "openvino": _load_openvino,
    "executorch": _load_executorch,
    "torch-export": _load_torch_export,
}
