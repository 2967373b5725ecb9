"""Linear layers with 8-bit products for CPUs with AVX-512 VNNI, through a C library.

Each row of the input and each column of the weight is scaled by its own largest value to integers in [-127, 127]. The
scales are computed at run time, so nothing has to be calibrated. Products are summed exactly; bias, activation,
normalization and residual stay in float32 (the equation is in kernels/int8_linear/int8_linear.h). This is the
vector-wise quantization of LLM.int8() (Dettmers et al. 2022, section 3.1).
"""

import ctypes
import functools
import logging
from pathlib import Path

# torch is imported before the library is loaded, so that both share one OpenMP runtime and its threads.
import torch
from torch import Tensor, nn

from ..model.compiled_libraries import find_compiled
from .onednn import can_pack
from .packed_linear import PackedLinear, runs_packed, state_of

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


class Int8Library:
    """The compiled functions of the 8-bit layers.

    Args:
        path: The shared library.

    Raises:
        OSError: The file is not a library that can be loaded here.
        AttributeError: The library lacks one of the functions.
    """

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
        """Whether this CPU has the instructions that the library needs (AVX-512 VNNI)."""
        return bool(self._library.int8_supported())

    def pack(self, inputs: int, columns: int, weight: Tensor, packed: Tensor, scale: Tensor, offset: Tensor) -> None:
        """Quantize an (N, C) weight into the tensors `packed`, `scale` and `offset` of an Int8Weight."""
        pointers = (x.data_ptr() for x in (weight, packed, scale, offset))
        _check(self._library.int8_pack(inputs, columns, *pointers))

    def linear(
        self,
        x: Tensor,
        weight: Int8Weight,
        activation: str = "none",
        addend: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Compute activation((x + addend) W^T + b).

        Args:
            x: (..., C) float32 input.
            weight: Quantized weight with C inputs and N columns.
            activation: "none", "relu" or "gelu".
            addend: Tensor that is added to x: it has x's shape, or size 1 along the first dimension. None adds nothing.
            out: Contiguous tensor (..., N) that takes the result; a new one if None.

        Returns:
            (..., N) float32 output.

        Raises:
            ValueError: The width of x or the shape of the addend does not fit.
        """
        layer, x = weight.described, x.contiguous()
        rows, repeats = _rows(x, layer.inputs), 1
        if addend is not None:
            addend = addend.contiguous()
            repeats = _rows(addend, layer.inputs)
            if addend.shape[1:] != x.shape[1:] or len(addend) not in (1, len(x)):
                raise ValueError(
                    f"addend is {tuple(addend.shape)} and x is {tuple(x.shape)}: give it x's shape, or 1 as first size."
                )
        out = _output(out, x, layer.columns)
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
        out: Tensor | None = None,
    ) -> Tensor:
        """Compute a feed-forward block with its normalizations and residual, without intermediate results in memory.

            x' = x + y W_y^T + b_y                            with a branch (y, W_y), otherwise x' = x
            z  = before(x')
            out = after(z + second(activation(first(z))))     with `after` (a post-norm layer)
            out = x' + second(activation(first(z)))           without it (a pre-norm layer)

        Args:
            x: (..., C) float32 input.
            first: Quantized weight from C to the hidden width.
            second: Quantized weight from the hidden width to C.
            activation: Activation between the two: "none", "relu" or "gelu".
            before: Normalization over C in front of the block.
            branch: An input y (..., C) float32 and its quantized weight W_y from C to C, or None.
            after: Normalization over C behind the block, or None.
            out: Contiguous tensor (..., C) that takes the result, not x itself; a new one if None.

        Returns:
            (..., C) float32 output.

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
                    f"The branch is {tuple(other.shape)} {other.dtype} and x is {tuple(x.shape)} {x.dtype}: give them "
                    "one shape and dtype."
                )
        out = _output(out, x, x.shape[-1])
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
        out: Tensor | None = None,
    ) -> Tensor:
        """Compute the attention half of a Swin layer (Liu et al. 2021, section 3.2) with heads of 32 channels.

            q, k, v = qkv(before(x))
            out = x + project(softmax(q k^T / sqrt(32) + bias [- 100 between regions]) v)     in each window

        Args:
            x: (B, T, C) float32 tokens.
            index: (W, A) int64 tokens of each of the W windows, T for padding; each token is in exactly one window.
            regions: (W, A) int64 region of each place; tokens attend to their own region only. None for one region.
            bias: (C / 32, A, A) float32 relative position bias of each head.
            before: Normalization over C in front of the attention.
            qkv: Quantized weight from C to 3C: queries, keys and values.
            project: Quantized weight from C to C.
            out: Contiguous tensor (B, T, C) that takes the tokens of these windows, not x itself; a new one if None.

        Returns:
            (B, T, C) float32 tokens.

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
                f"bias has shape {tuple(bias.shape)}: give float32 ({heads}, {area}, {area}) for {width} channels."
            )
        out = _output(out, x, width)
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
    """Load the library; None if it was not compiled, cannot be loaded, or this CPU lacks the instructions."""
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


class Int8Linear(PackedLinear):
    """A PackedLinear that multiplies 8-bit integers; outside float32 inference on a CPU it is an ordinary layer."""

    def weight_for(self, x: Tensor) -> Int8Weight | None:
        """Return the quantized weight if this layer can run on x in 8 bits, else None."""
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
        """Map (..., C), plus the addend if one is given, to (..., N)."""
        weight = self.weight_for(x)
        if weight is None:
            return super().forward(x if addend is None else x + addend)
        return weight.library.linear(x, weight, self.activation, addend)


def weights_for(x: Tensor, *layers: nn.Module) -> list[Int8Weight] | None:
    """Return the quantized weights of several layers, or None if any of them cannot run on x in 8 bits."""
    weights = []
    for layer in layers:
        weight = layer.weight_for(x) if isinstance(layer, Int8Linear) else None
        if weight is None:
            return None
        weights.append(weight)
    return weights


def _rows(x: Tensor, width: int) -> int:
    if x.shape[-1] != width or x.dtype != torch.float32:
        raise ValueError(
            f"The layer takes {width} float32 channels: give it those instead of {x.shape[-1]} {x.dtype} ones."
        )
    return x.numel() // width


def _output(out: Tensor | None, x: Tensor, columns: int) -> Tensor:
    shape = (*x.shape[:-1], columns)
    if out is None:
        return x.new_empty(shape)
    if out.shape != shape or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}: give a contiguous {x.dtype} tensor of shape {shape}.")
    return out


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _describe(norm: nn.LayerNorm, width: int) -> _Norm:
    if norm.weight.shape != (width,) or norm.weight.dtype != torch.float32:
        given = f"{tuple(norm.weight.shape)} {norm.weight.dtype}"
        raise ValueError(f"The normalization has weights {given}: give it {width} float32 weights.")
    return _Norm(norm.weight.data_ptr(), _pointer(norm.bias), norm.eps)


def _check(status: int) -> None:
    if status == 2:
        raise MemoryError("The 8-bit linear layers ran out of memory: use a smaller batch or image.")
    if status:
        raise RuntimeError(f"The 8-bit linear layers refused their arguments (status {status}).")
