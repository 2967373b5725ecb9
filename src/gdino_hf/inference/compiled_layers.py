"""Linear layers, feed-forward blocks and window attention in C, whatever the numbers that they multiply.

A library of such layers has three functions, and the classes here call them. float_linear.py and int8_linear.py say how
a weight is packed for each of the two libraries.
"""

import ctypes
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

# torch is imported before a library is loaded, so that both share one OpenMP runtime and its threads.
import torch
from torch import Tensor, nn

from .packed_linear import PackedLinear, runs_packed, state_of

logger = logging.getLogger(__name__)

Library = TypeVar("Library", bound="LayerLibrary")

_ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}


class Norm(ctypes.Structure):
    """A normalization over the channels, as the libraries describe it."""

    _fields_ = [("scale", ctypes.c_void_p), ("shift", ctypes.c_void_p), ("epsilon", ctypes.c_float)]


class CompiledWeight:
    """A weight with its bias in a library's layout; owns the memory that it points to.

    Attributes:
        library: The library whose layout it has.
        described: The library's own description of the layer.
    """

    library: "LayerLibrary"
    described: Any


class LayerLibrary:
    """The compiled functions of one kind of layers.

    Args:
        path: The shared library.

    Raises:
        OSError: The file is not a library that can be loaded here.
        AttributeError: The library lacks one of the functions.
    """

    prefix: ClassVar[str]
    """Beginning of the names of the functions."""
    layer_type: ClassVar[type[ctypes.Structure]]
    """The library's description of a layer."""

    def __init__(self, path: str | Path) -> None:
        self._library = ctypes.CDLL(str(path))
        count, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
        layer, norm = ctypes.POINTER(self.layer_type), ctypes.POINTER(Norm)
        self.packed_bytes = self.function("packed_bytes", count, [count] * 2)
        self.padded_columns = self.function("padded_columns", count, [count])
        self.supported = self.function("supported", number, [])
        self._functions = {
            name: self.function(name, number, arguments)
            for name, arguments in (
                ("linear", [count, pointer, pointer, count, layer, number, number, pointer]),
                (
                    "feed_forward",
                    [count, pointer, pointer, layer, norm, layer, number, layer, norm, number, number, pointer],
                ),
                ("window_attention", [count] * 5 + [pointer] * 3 + [norm, layer, pointer, layer, number, pointer]),
            )
        }

    def function(self, name: str, result: Any, arguments: list[Any]) -> Callable[..., int]:
        """Return a function of the library; `result` and `arguments` are types of ctypes."""
        found = getattr(self._library, f"{self.prefix}_{name}")
        found.restype, found.argtypes = result, arguments
        return found

    def linear(
        self,
        x: Tensor,
        weight: CompiledWeight,
        activation: str = "none",
        addend: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Compute activation((x + addend) W^T + b).

        Args:
            x: (..., C) float32 input.
            weight: Packed weight with C inputs and N columns.
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
        run = self._functions["linear"]
        number = _ACTIVATIONS[activation]
        check_status(
            run(rows, x.data_ptr(), _pointer(addend), repeats, layer, number, torch.get_num_threads(), out.data_ptr())
        )
        return out

    def feed_forward(
        self,
        x: Tensor,
        first: CompiledWeight,
        second: CompiledWeight,
        activation: str,
        *,
        before: nn.LayerNorm,
        branch: tuple[Tensor, CompiledWeight] | None = None,
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
            first: Packed weight from C to the hidden width.
            second: Packed weight from the hidden width to C.
            activation: Activation between the two: "none", "relu" or "gelu".
            before: Normalization over C in front of the block.
            branch: An input y (..., C) float32 and its packed weight W_y from C to C, or None.
            after: Normalization over C behind the block, or None.
            out: Contiguous tensor (..., C) that takes the result, not x itself; a new one if None.

        Returns:
            (..., C) float32 output.

        Raises:
            ValueError: The widths do not fit.
        """
        x = x.contiguous()
        rows = _rows(x, first.described.inputs)
        other, project = None, self.layer_type()
        if branch is not None:
            other, project = branch[0].contiguous(), branch[1].described
            if other.shape != x.shape or other.dtype != x.dtype:
                raise ValueError(
                    f"The branch is {tuple(other.shape)} {other.dtype} and x is {tuple(x.shape)} {x.dtype}: give them "
                    "one shape and dtype."
                )
        out = _output(out, x, x.shape[-1])
        check_status(
            self._functions["feed_forward"](
                rows,
                x.data_ptr(),
                _pointer(other),
                project,
                describe(before, x.shape[-1]),
                first.described,
                _ACTIVATIONS[activation],
                second.described,
                Norm() if after is None else describe(after, x.shape[-1]),
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
        qkv: CompiledWeight,
        project: CompiledWeight,
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
            qkv: Packed weight from C to 3C: queries, keys and values.
            project: Packed weight from C to C.
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
        check_status(
            self._functions["window_attention"](
                *sizes,
                index.data_ptr(),
                _pointer(regions),
                x.data_ptr(),
                describe(before, x.shape[-1]),
                qkv.described,
                bias.data_ptr(),
                project.described,
                torch.get_num_threads(),
                out.data_ptr(),
            )
        )
        return out


def open_library(kind: type[Library], path: Path | None, what: str) -> Library | None:
    """Load a library of layers.

    Args:
        kind: Its class.
        path: Its file; None if it was not compiled.
        what: What it computes, for the warning.

    Returns:
        The library, or None if it was not compiled, cannot be loaded (a warning says why), or does not run on this CPU.
    """
    if path is None:
        return None
    try:
        library = kind(path)
    except (OSError, AttributeError) as error:
        logger.warning("The %s cannot be loaded from %s: %s", what, path, error)
        return None
    return library if library.supported() else None


class CompiledLinear(PackedLinear):
    """A PackedLinear that runs in a C library; outside float32 inference on a CPU it is an ordinary layer."""

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None) -> CompiledWeight | None:
        """Pack an (N, C) weight and its (N,) bias, or return None if the library cannot run here."""
        raise NotImplementedError

    def weight_for(self, x: Tensor) -> CompiledWeight | None:
        """Return the packed weight if this layer can run on x in the library, else None."""
        if x.dtype != torch.float32 or not runs_packed(x, self.weight):
            return None
        key = (type(self), *state_of(self.weight, *([] if self.bias is None else [self.bias])))
        if self._packed is None or self._packed[0] != key:
            with torch.inference_mode(False):
                packed = self.pack(self.weight, self.bias)
            if packed is None:
                return None
            self._packed = (key, packed)
        return self._packed[1]

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Map (..., C), plus the addend if one is given, to (..., N)."""
        weight = self.weight_for(x)
        if weight is None:
            return super().forward(x if addend is None else x + addend)
        return weight.library.linear(x, weight, self.activation, addend)

    def writer(self, x: Tensor) -> Callable[..., None]:
        """Return a function that writes results of inputs like x; see `PackedLinear.writer`."""
        weight = self.weight_for(x)
        if weight is None:
            return super().writer(x)

        def write(output: Tensor, x: Tensor, addend: Tensor | None = None) -> None:
            weight.library.linear(x, weight, self.activation, addend, out=output)

        return write


def weights_for(x: Tensor, *layers: nn.Module) -> list[CompiledWeight] | None:
    """Return the packed weights of several layers, or None if any of them cannot run on x in a library."""
    weights = []
    for layer in layers:
        weight = layer.weight_for(x) if isinstance(layer, CompiledLinear) else None
        if weight is None:
            return None
        weights.append(weight)
    return weights


def finish_layer(
    x: Tensor,
    y: Tensor,
    weights: Sequence[CompiledWeight],
    before: nn.LayerNorm,
    after: nn.LayerNorm,
    output: Tensor,
) -> None:
    """Write after(z + second(relu(first(z)))) with z = before(x + project(y)): the end of a post-norm layer.

    Args:
        x: (N, C) input of the layer.
        y: (N, C) result of its attention.
        weights: Packed weights of `first`, `second` and `project`.
        before: Normalization in front of the feed-forward block.
        after: Normalization behind it.
        output: Contiguous tensor (N, C) that takes the result.
    """
    first, second, project = weights
    first.library.feed_forward(x, first, second, "relu", branch=(y, project), before=before, after=after, out=output)


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


def describe(norm: nn.LayerNorm, width: int) -> Norm:
    """Describe a normalization over `width` channels; a ValueError if it is none."""
    if norm.weight.shape != (width,) or norm.weight.dtype != torch.float32:
        given = f"{tuple(norm.weight.shape)} {norm.weight.dtype}"
        raise ValueError(f"The normalization has weights {given}: give it {width} float32 weights.")
    return Norm(norm.weight.data_ptr(), _pointer(norm.bias), norm.eps)


def check_status(status: int) -> None:
    if status == 2:
        raise MemoryError("The compiled layers ran out of memory: use a smaller batch or image.")
    if status:
        raise RuntimeError(f"The compiled layers refused their arguments (status {status}).")
