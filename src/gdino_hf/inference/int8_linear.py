"""Linear layers with 8-bit products for inference on a CPU with AVX-512 VNNI, through a C library.

Each row of the input is scaled to whole numbers of -127..127 by its own largest value and each column of the weight by
its own, when they are met: there is nothing to calibrate. Their products are summed exactly; bias, activation,
normalization and residual stay float32 (kernels/int8_linear/int8_linear.h has the equation). This is LLM.int8's
vector-wise quantization (Dettmers et al. 2022, 3.1).
"""

import ctypes
import functools
import logging
from pathlib import Path

# torch comes first: the library shares torch's copy of the OpenMP run time, and with it torch's threads.
import torch
from torch import Tensor, nn

from ..model.compiled_libraries import find_compiled
from .packed_linear import PackedLinear, can_pack, runs_packed, state_of

logger = logging.getLogger(__name__)

_LIBRARY = "_int8_cpu"
_ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}


class _Layer(ctypes.Structure):
    _fields_ = [("inputs", ctypes.c_int64), ("columns", ctypes.c_int64)] + [
        (name, ctypes.c_void_p) for name in ("weight", "scale", "bias", "offset")
    ]


class _Norm(ctypes.Structure):
    _fields_ = [("scale", ctypes.c_void_p), ("shift", ctypes.c_void_p), ("epsilon", ctypes.c_float)]


class Int8Weight:
    """A weight and its bias as the library reads them; keeps alive what it points to.

    Args:
        library: The loaded library.
        weight: (N, C) float32.
        bias: (N,) float32 or None.
    """

    def __init__(self, library: "Int8Library", weight: Tensor, bias: Tensor | None) -> None:
        self.library = library
        columns, inputs = weight.shape
        padded = library.padded_columns(columns)
        # Of the weight's own device and a dtype of their own, whatever the defaults are: C writes to them.
        self.weight = weight.new_empty(library.packed_bytes(inputs, columns), dtype=torch.int8)
        self.scale, self.offset = weight.new_empty(padded), weight.new_empty(padded, dtype=torch.int32)
        self.bias = None if bias is None else bias.detach().contiguous()
        library.pack(inputs, columns, weight.detach().contiguous(), self.weight, self.scale, self.offset)
        pointers = (x if x is None else x.data_ptr() for x in (self.weight, self.scale, self.bias, self.offset))
        self.described = _Layer(inputs, columns, *pointers)


class Int8Library:
    """The compiled functions."""

    def __init__(self, path: str | Path) -> None:
        self._library = ctypes.CDLL(str(path))
        count, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
        layer, norm = ctypes.POINTER(_Layer), ctypes.POINTER(_Norm)
        for name, result, arguments in (
            ("supported", number, []),
            ("packed_bytes", count, [count] * 2),
            ("padded_columns", count, [count]),
            ("pack", number, [count] * 2 + [pointer] * 4),
            ("linear", number, [count, pointer, pointer, count, layer, number, number, pointer]),
            (
                "feed_forward",
                number,
                [count, pointer, pointer, layer, norm, layer, number, layer, norm, number, number, pointer],
            ),
            (
                "window_attention",
                number,
                [count] * 5 + [pointer] * 3 + [norm, layer, pointer, layer, number, pointer],
            ),
        ):
            function = getattr(self._library, f"int8_{name}")
            function.restype, function.argtypes = result, arguments
        self.packed_bytes, self.padded_columns = self._library.int8_packed_bytes, self._library.int8_padded_columns

    @property
    def supported(self) -> bool:
        """Whether this CPU has the instructions."""
        return bool(self._library.int8_supported())

    def pack(self, inputs: int, columns: int, weight: Tensor, packed: Tensor, scale: Tensor, offset: Tensor) -> None:
        """Fill what an Int8Weight holds."""
        pointers = (x.data_ptr() for x in (weight, packed, scale, offset))
        _check(self._library.int8_pack(inputs, columns, *pointers))

    def linear(self, x: Tensor, weight: Int8Weight, activation: str = "none", addend: Tensor | None = None) -> Tensor:
        """activation((x + addend) W^T + b).

        Args:
            x: (..., C) float32.
            weight: Of C inputs and N columns.
            activation: "none", "relu" or "gelu".
            addend: Like x, or of size 1 along the first dimension, or None.

        Returns:
            (..., N) float32.

        Raises:
            ValueError: The widths or the addend do not fit.
        """
        layer, x = weight.described, x.contiguous()
        rows, repeats = _rows(x, layer.inputs), 1
        if addend is not None:
            addend = addend.contiguous()
            repeats = _rows(addend, layer.inputs)
            if addend.shape[1:] != x.shape[1:] or len(addend) not in (1, len(x)):
                raise ValueError(
                    f"addend is {tuple(addend.shape)} and x {tuple(x.shape)}, give it x's shape or 1 as its first size."
                )
        out = x.new_empty(*x.shape[:-1], layer.columns)
        run = self._library.int8_linear
        number = _ACTIVATIONS[activation]
        _check(
            run(rows, x.data_ptr(), _pointer(addend), repeats, layer, number, torch.get_num_threads(), out.data_ptr())
        )
        return out

    def feed_forward(
        self,
        x: Tensor,
        first: Int8Weight,
        second: Int8Weight,
        activation: str,
        *,
        before: nn.LayerNorm,
        branch: tuple[Tensor, Int8Weight] | None = None,
        after: nn.LayerNorm | None = None,
    ) -> Tensor:
        """A feed-forward block with what stands around it, none of which is written to memory.

            x' = x + y W_y^T + b_y                      with a branch (y, its weight); x' = x without
            z  = before(x')
            out = after(z + second(activation(first(z))))     with `after`, a post-norm layer
            out = x' + second(activation(first(z)))           without, a pre-norm layer

        Args:
            x: (..., C) float32.
            first, second: C to the hidden width and back.
            activation: Between the two, "none", "relu" or "gelu".
            before, after: Normalizations over C.
            branch: y (..., C) and its weight of C inputs and columns.

        Returns:
            (..., C) float32.

        Raises:
            ValueError: The widths do not fit.
        """
        x = x.contiguous()
        rows = _rows(x, first.described.inputs)
        other, project = None, _Layer()
        if branch is not None:
            other, project = branch[0].contiguous(), branch[1].described
            if other.shape != x.shape or other.dtype != x.dtype:
                raise ValueError(
                    f"The branch is {tuple(other.shape)} of {other.dtype} and x {tuple(x.shape)} of {x.dtype}, give "
                    "them one shape and dtype."
                )
        out = torch.empty_like(x)
        _check(
            self._library.int8_feed_forward(
                rows,
                x.data_ptr(),
                _pointer(other),
                project,
                _describe(before, x.shape[-1]),
                first.described,
                _ACTIVATIONS[activation],
                second.described,
                _Norm() if after is None else _describe(after, x.shape[-1]),
                after is not None,
                torch.get_num_threads(),
                out.data_ptr(),
            )
        )
        return out

    def window_attention(
        self,
        x: Tensor,
        index: Tensor,
        regions: Tensor | None,
        bias: Tensor,
        *,
        before: nn.LayerNorm,
        qkv: Int8Weight,
        project: Int8Weight,
    ) -> Tensor:
        """The attention half of a Swin layer (Liu et al. 2021, 3.2), of heads 32 wide.

            q, k, v = qkv(before(x))
            out = x + project(softmax(q k^T / sqrt(32) + bias [- 100 between regions]) v)     in each window

        Args:
            x: (B, T, C) float32.
            index: (W, A) int64, the tokens of each window, T for padding; each token stands in one window.
            regions: (W, A) int64, or None where all of a window see each other.
            bias: (C / 32, A, A) float32.
            before: Normalization over C.
            qkv, project: C to 3 C, and C to C.

        Returns:
            (B, T, C) float32.

        Raises:
            ValueError: The widths do not fit.
        """
        x, bias, index = x.contiguous(), bias.contiguous(), index.contiguous()
        regions = None if regions is None else regions.contiguous()
        batch, tokens, width = x.shape
        windows, area = index.shape
        heads = width // 32
        _rows(x, qkv.described.inputs)
        if bias.numel() != heads * area * area or bias.dtype != torch.float32 or width != 32 * heads:
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}, give it float32 ({heads}, {area}, {area}) for {width} channels."
            )
        out = torch.empty_like(x)
        sizes = (batch, tokens, windows, area, heads)
        _check(
            self._library.int8_window_attention(
                *sizes,
                index.data_ptr(),
                _pointer(regions),
                x.data_ptr(),
                _describe(before, x.shape[-1]),
                qkv.described,
                bias.data_ptr(),
                project.described,
                torch.get_num_threads(),
                out.data_ptr(),
            )
        )
        return out


@functools.cache
def load() -> Int8Library | None:
    """The library, or None where it was not compiled or this CPU lacks the instructions."""
    path = find_compiled(_LIBRARY)
    if path is None:
        return None
    try:
        library = Int8Library(path)
    except (OSError, AttributeError) as error:
        logger.warning("The 8-bit linear layers cannot be loaded from %s: %s", path, error)
        return None
    return library if library.supported else None


def has_int8() -> bool:
    """Whether layers can multiply 8-bit numbers here."""
    return load() is not None and can_pack(torch.float32)


def check_int8(device: torch.device, dtype: torch.dtype) -> None:
    """Say why a model cannot multiply 8-bit numbers.

    Raises:
        ValueError: It cannot.
    """
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"int8 is for float32 and bfloat16 models on a CPU, not {dtype} on {device}: leave it out.")
    if find_compiled(_LIBRARY) is None:
        raise ValueError(
            "int8 needs the compiled layers, which are not built here: install gdino-hf again where there is a C "
            "compiler, or leave int8 out."
        )
    if not can_pack(torch.float32):
        raise ValueError("int8 needs a build of torch with oneDNN, which this one lacks: leave it out.")
    if load() is None:
        raise ValueError("int8 needs a CPU with AVX-512 VNNI, which this one lacks: leave it out.")


class Int8Linear(PackedLinear):
    """A PackedLinear that multiplies 8-bit numbers where nothing is recorded, traced or moved off the CPU."""

    def weight_for(self, x: Tensor) -> Int8Weight | None:
        """The packed weight if this layer may run on x in 8 bits."""
        if x.dtype != torch.float32 or not runs_packed(x, self.weight):
            return None
        library = load()
        if library is None:
            return None
        key = ("int8", *state_of(self.weight, *([] if self.bias is None else [self.bias])))
        if self._packed is None or self._packed[0] != key:
            with torch.inference_mode(False):
                self._packed = (key, Int8Weight(library, self.weight, self.bias))
        return self._packed[1]

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """(..., C), plus an addend if there is one, to (..., N)."""
        weight = self.weight_for(x)
        if weight is None:
            return super().forward(x if addend is None else x + addend)
        return weight.library.linear(x, weight, self.activation, addend)


def weights_for(x: Tensor, *layers: nn.Module) -> list[Int8Weight] | None:
    """The packed weights of Int8Linear layers, or None where one is another or may not run on x in 8 bits."""
    weights = []
    for layer in layers:
        weight = layer.weight_for(x) if isinstance(layer, Int8Linear) else None
        if weight is None:
            return None
        weights.append(weight)
    return weights


def _rows(x: Tensor, width: int) -> int:
    if x.shape[-1] != width or x.dtype != torch.float32:
        raise ValueError(f"The layer takes {width} float32 channels, not {x.shape[-1]} of {x.dtype}.")
    return x.numel() // width


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _describe(norm: nn.LayerNorm, width: int) -> _Norm:
    if norm.weight.shape != (width,) or norm.weight.dtype != torch.float32:
        given = f"{tuple(norm.weight.shape)} of {norm.weight.dtype}"
        raise ValueError(f"The normalization has weights {given}, give it {width} of float32.")
    return _Norm(norm.weight.data_ptr(), _pointer(norm.bias), norm.eps)


def _check(status: int) -> None:
    if status == 2:
        raise MemoryError("The 8-bit linear layers ran out of memory, use a smaller batch or image.")
    if status:
        raise RuntimeError(f"The 8-bit linear layers refused their arguments (status {status}).")
