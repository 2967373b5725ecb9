"""Linear layers with 8-bit products for CPUs with AVX-512 VNNI, through a C library.

Each row of the input and each column of the weight is scaled by its own largest value to integers in [-127, 127]. The
scales are computed at run time, so nothing has to be calibrated. Products are summed exactly; bias, activation,
normalization and residual stay in float32 (the equation is in kernels/int8_linear/int8_linear.h). This is the
vector-wise quantization of LLM.int8() (Dettmers et al. 2022, section 3.1).
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ..model.compiled_libraries import find_compiled
from .compiled_layers import CompiledLinear, CompiledWeight, LayerLibrary, check_status, open_library
from .onednn import can_pack

_LIBRARY = "_int8_cpu"


class _Layer(ctypes.Structure):
    _fields_ = [("inputs", ctypes.c_int64), ("columns", ctypes.c_int64)] + [
        (name, ctypes.c_void_p) for name in ("weight", "scale", "bias", "offset")
    ]


class Int8Weight(CompiledWeight):
    """A quantized weight with its bias, in the library's layout; owns the memory that it points to.

    Args:
        library: The loaded library.
        weight: (N, C) float32 weight.
        bias: (N,) float32 bias, or None.
    """

    def __init__(self, library: "Int8Library", weight: Tensor, bias: Tensor | None) -> None:
        self.library = library
        columns, inputs = weight.shape
        padded = library.padded_columns(columns)
        # Allocated explicitly on the weight's device: C writes here and must not see torch's default device or dtype.
        self.weight = weight.new_empty(library.packed_bytes(inputs, columns), dtype=torch.int8)
        self.scale, self.offset = weight.new_empty(padded), weight.new_empty(padded, dtype=torch.int32)
        self.bias = None if bias is None else bias.detach().contiguous()
        library.pack(inputs, columns, weight.detach().contiguous(), self.weight, self.scale, self.offset)
        pointers = (x if x is None else x.data_ptr() for x in (self.weight, self.scale, self.bias, self.offset))
        self.described = _Layer(inputs, columns, *pointers)


class Int8Library(LayerLibrary):
    """The compiled functions of the 8-bit layers, see LayerLibrary."""

    prefix, layer_type = "int8", _Layer

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        count, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
        self._pack = self.function("pack", number, [count] * 2 + [pointer] * 4)

    def pack(self, inputs: int, columns: int, weight: Tensor, packed: Tensor, scale: Tensor, offset: Tensor) -> None:
        """Quantize an (N, C) weight into the tensors `packed`, `scale` and `offset` of an Int8Weight."""
        pointers = (x.data_ptr() for x in (weight, packed, scale, offset))
        check_status(self._pack(inputs, columns, *pointers))


@functools.cache
def load() -> Int8Library | None:
    """Load the library; None if it was not compiled, cannot be loaded, or this CPU lacks the instructions."""
    return open_library(Int8Library, find_compiled(_LIBRARY), "8-bit linear layers")


def has_int8() -> bool:
    """Return whether 8-bit layers can run on this machine."""
    return load() is not None and can_pack(torch.float32)


def check_int8(device: torch.device, dtype: torch.dtype) -> None:
    """Check that a model can use 8-bit layers on this machine.

    Args:
        device: Device of the model.
        dtype: Dtype of the model.

    Raises:
        ValueError: It cannot; the message says why and what to do.
    """
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"int8 is for float32 and bfloat16 models on a CPU, not {dtype} on {device}: leave int8 out.")
    if find_compiled(_LIBRARY) is None:
        raise ValueError(
            "int8 needs compiled layers, which are not built here: reinstall gdino-hf on a machine with a C compiler, "
            "or leave int8 out."
        )
    if not can_pack(torch.float32):
        raise ValueError("int8 needs a build of torch with oneDNN, and this one has none: leave int8 out.")
    if load() is None:
        raise ValueError("int8 needs a CPU with AVX-512 VNNI, and this one has none: leave int8 out.")


class Int8Linear(CompiledLinear):
    """A layer that multiplies 8-bit integers; outside float32 inference on a CPU it is an ordinary one."""

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None) -> Int8Weight | None:
        """Quantize an (N, C) weight, or return None if 8-bit layers cannot run here."""
        library = load()
        return None if library is None else Int8Weight(library, weight, bias)
