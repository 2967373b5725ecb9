"""Linear layers in float32 for CPUs with AVX2 or AVX-512, through a C library.

Products are as fast as those of oneDNN or faster, depending on the CPU. What stands between two products is computed
with them: bias, activation, residual, normalization, and the attention inside a window. Results differ from PyTorch's
by rounding only.
"""

import ctypes
import functools
from pathlib import Path

from torch import Tensor, nn

from ..model.compiled_libraries import find_compiled
from .compiled_layers import CompiledLinear, CompiledWeight, LayerLibrary, Norm, check_status, describe, open_library

_LIBRARY = "_float_cpu"


class FloatLayer(ctypes.Structure):
    """A packed layer, as the library describes it."""

    _fields_ = [
        ("inputs", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


class FloatWeight(CompiledWeight):
    """A float32 weight with its bias, in the library's layout; owns the memory that it points to.

    Args:
        library: The loaded library.
        weight: (N, C) float32 weight.
        bias: (N,) float32 bias, or None.
    """

    library: "FloatLibrary"

    def __init__(self, library: "FloatLibrary", weight: Tensor, bias: Tensor | None) -> None:
        self.library = library
        columns, inputs = weight.shape
        # Allocated explicitly on the weight's device: C writes here and must not see torch's default device or dtype.
        self.weight = weight.new_empty(library.packed_bytes(inputs, columns) // 4)
        self.bias = None
        if bias is not None:
            self.bias = weight.new_zeros(library.padded_columns(columns))
            self.bias[:columns] = bias.detach()
        library.pack(weight.detach().contiguous(), self.weight)
        pointers = (x if x is None else x.data_ptr() for x in (self.weight, self.bias))
        self.described = FloatLayer(inputs, columns, *pointers)


class FloatLibrary(LayerLibrary):
    """The compiled functions of the float32 layers, see LayerLibrary."""

    prefix, layer_type = "float", FloatLayer

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        count, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
        self._pack = self.function("pack", number, [count] * 2 + [pointer] * 2)
        layer = ctypes.POINTER(self.layer_type)
        norm = ctypes.POINTER(Norm)
        self._fuse = self.function(
            "fuse", number, [count, count, pointer, norm, layer, pointer, layer, pointer, *[pointer] * 4]
        )

    def pack(self, weight: Tensor, packed: Tensor) -> None:
        """Write an (N, C) weight to a tensor of `packed_bytes` in the library's layout."""
        columns, inputs = weight.shape
        check_status(self._pack(inputs, columns, weight.data_ptr(), packed.data_ptr()))

    def fuse(
        self,
        vision: Tensor,
        norm: nn.LayerNorm,
        directions: FloatWeight,
        text_mask: Tensor,
        brought: FloatWeight,
        real: Tensor | None,
        *,
        out: Tensor,
        peaks: Tensor,
        sums: Tensor,
        pooled: Tensor,
    ) -> None:
        """Fuse some image tokens with the text, for M heads and T text tokens; the equation is in float_linear.h.

        Args:
            vision: (N, D) contiguous float32 image features.
            norm: Normalization over D in front.
            directions: Packed weight (M * T, D) that maps a token to its scores.
            text_mask: (T,) float32, 1 on real text tokens and 0 elsewhere; at least one is real.
            brought: Packed weight (D, M * T) that maps attention weights to what a token receives.
            real: (N,) contiguous bool, True on real image tokens; None if all are.
            out: (N, D) contiguous float32 that takes the fused features.
            peaks: (M * T) contiguous float32 that takes the largest score of each column over the real tokens.
            sums: (M * T) contiguous float32 that takes the sum of e^(score - peak).
            pooled: (M * T, D) contiguous float32 that takes the sum of e^(score - peak) times the features.

        Raises:
            ValueError: The normalization does not fit.
        """
        check_status(
            self._fuse(
                len(vision),
                directions.described.columns // len(text_mask),
                vision.data_ptr(),
                describe(norm, vision.shape[-1]),
                directions.described,
                text_mask.data_ptr(),
                brought.described,
                None if real is None else real.data_ptr(),
                *(x.data_ptr() for x in (out, peaks, sums, pooled)),
            )
        )


@functools.cache
def load() -> FloatLibrary | None:
    """Load the library; None if it was not compiled, cannot be loaded, or this CPU lacks the instructions."""
    return open_library(FloatLibrary, find_compiled(_LIBRARY), "float32 layers")


class FloatLinear(CompiledLinear):
    """A layer that multiplies float32 numbers in the C library; outside inference on a CPU it is an ordinary one."""

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None) -> FloatWeight | None:
        """Pack an (N, C) weight, or return None if the library cannot run here."""
        library = load()
        return None if library is None else FloatWeight(library, weight, bias)
