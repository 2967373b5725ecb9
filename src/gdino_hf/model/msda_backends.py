"""Choice of the backend that computes multi-scale deformable attention.

The choice is made each time the operator runs, so a compiled graph or an export works on any machine. "auto" takes the
fastest backend that loads. The environment variable GDINO_MSDA requests one: "c" (the CPU library of an installed
gdino_hf), "triton" (GPUs), "hub" (the CUDA kernel from the Hub) or "torch" (the reference). Where the requested backend
cannot run, the choice falls back to "auto".

A backend is an object with three functions: `supports(value, sampling_locations)`, `forward` and `backward`, whose
arguments are those of `msda_reference`. To add one, write a file with a cached `load()` that returns such an object or
None, and name it in `_BACKENDS`, `candidates` and `implementation`.
"""

import functools
import logging
import os
from typing import Any

import torch
from torch import Tensor

from .msda_c import load as load_c_library
from .msda_hub import is_allowed as hub_is_allowed
from .msda_hub import load as load_hub_kernel
from .msda_triton import load as load_triton_kernels

logger = logging.getLogger(__name__)

_VARIABLE = "GDINO_MSDA"
_BACKENDS = ("auto", "c", "triton", "hub", "torch")


@functools.cache
def _c_library() -> Any:
    return load_c_library()


def requested_backend() -> str:
    """Return the backend that GDINO_MSDA requests, "auto" if the variable is unset.

    Raises:
        ValueError: GDINO_MSDA is not the name of a backend.
    """
    name = os.environ.get(_VARIABLE, "auto").lower()
    if name not in _BACKENDS:
        raise ValueError(f"{_VARIABLE}={name!r} names no backend; choose one of {', '.join(_BACKENDS)}.")
    return name


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)


def candidates(device_type: str) -> list[str]:
    """List the backends to try for a device, best first, without the reference, which always runs.

    Args:
        device_type: torch's name of the device, such as "cpu" or "cuda".

    Returns:
        Names of backends; empty if the reference was requested.
    """
    requested = requested_backend()
    if requested == "torch":
        return []
    automatic = ["c"] if device_type == "cpu" else ["triton"]
    if device_type != "cpu" and hub_is_allowed():
        automatic.insert(0, "hub")
    return automatic if requested == "auto" else [requested, *automatic]


def implementation(name: str) -> Any:
    """Return the backend of this name, or None if it cannot be loaded here."""
    return {"c": _c_library, "triton": load_triton_kernels, "hub": load_hub_kernel}[name]()


def backend_for(value: Tensor, sampling_locations: Tensor) -> str:
    """Return the name of the backend that runs for these inputs.

    If a requested backend cannot run, one log line says which other one does.

    Args:
        value: (B, S, M, Dh) values.
        sampling_locations: (B, Q, M, L, K, 2) locations.

    Returns:
        "c", "triton", "hub" or "torch".
    """
    chosen = "torch"
    for name in candidates(value.device.type):
        backend = implementation(name)
        if backend is not None and backend.supports(value, sampling_locations):
            chosen = name
            break
    requested = requested_backend()
    if requested not in ("auto", "c", chosen):
        where = f"{str(value.dtype).removeprefix('torch.')} on {value.device.type}"
        _log_once(f"{_VARIABLE}={requested} does not run for {where} here: {chosen} runs instead.")
    return chosen


@torch.compiler.assume_constant_result
def prefers_fused(device_type: str) -> bool:
    """Return whether the fused operator is faster: it is if the device's best backend computes the geometry itself."""
    return next((name for name in candidates(device_type) if implementation(name) is not None), "torch") == "triton"
