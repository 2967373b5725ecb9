"""Convolutions in float32 for CPUs with AVX2 or AVX-512, through the C library of float_linear.py.

The pixels that a few output pixels see are copied to the cache and multiplied there, so nothing is padded, cut into
strips or converted, and a leaky ReLU is computed with the convolution. Kernels of 3 x 3 pixels with step 1 need fewer
multiplications by Winograd's method (float_winograd.h), and their results are no less precise.
"""

import ctypes
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn

from ..model.csp_pan import ConvLeakyReLU
from .compiled_layers import check_status
from .float_linear import FloatLayer, FloatLibrary, load
from .packed_convolution import PackedConv2d
from .packed_linear import runs_packed, share_state, state_of
from .workers import even_rows, run_together

logger = logging.getLogger(__name__)

_PIXELS = 192
"""Pixels of the output that a block has at least, about: each block reads all of its weights."""
_BLOCKS, _COLUMNS = 4, 64
"""An image with fewer blocks is divided by channels, too, of which a block has at least so many."""
_LEAKY = 3  # number of the leaky ReLU in the library
_SIZES = 8
"""Sizes of images for which a layer keeps its description."""
_TRANSFORM = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
"""G of F(2 x 2, 3 x 3), see Lavin and Gray 2015, arXiv:1509.09308."""


class _Image(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("height", "width", "channels", "stride")]


class _Kernel(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("side", "step", "padding")]


class Convolution(ctypes.Structure):
    """A convolution, as the library describes it; see float_linear.h."""

    _fields_ = [
        ("images", ctypes.c_int64),
        ("source", _Image),
        ("target", _Image),
        ("layer", FloatLayer),
        ("kernel", _Kernel),
        ("transformed", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("slope", ctypes.c_float),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    ]


class _Packed(NamedTuple):
    """A convolution's weight in the library's layout, and its descriptions by (batch, height, width) of the input."""

    key: tuple
    weight: Tensor
    bias: Tensor | None
    described: dict[tuple[int, ...], Convolution]


@functools.cache
def function_of(library: FloatLibrary) -> Callable[..., int] | None:
    """Return the library's function for convolutions, or None if it has none."""
    try:
        arguments = [ctypes.POINTER(Convolution), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        return library.function("convolve", ctypes.c_int32, arguments)
    except AttributeError:
        logger.warning("The float32 layers were compiled from an older source: convolutions run in oneDNN.")
        return None


class FloatConv2d(PackedConv2d):
    """A convolution that shares another one's parameters and runs in the C library where possible.

    Args:
        convolution: The layer to replace; its parameters are shared.
        slope: Slope of a leaky ReLU that follows the layer and is computed with it; None for no activation.
        library: The C library; None for the installed one.
    """

    def __init__(self, convolution: nn.Conv2d, slope: float | None = None, library: FloatLibrary | None = None) -> None:
        super().__init__(convolution)
        self.slope = slope
        self._library = library
        self._ready: _Packed | None = None

    @staticmethod
    def computes(module: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Return whether the library computes a convolution: square, ungrouped, with zero padding, not dilated."""
        return (
            PackedConv2d.knows(module)
            and module.groups == 1
            and all(
                len(set(pair)) == 1
                for pair in (module.kernel_size, module.stride, cast("tuple[int, int]", module.padding))
            )
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_ready": None, "_library": None}

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, N, H', W')."""
        library = self._library_for(x)
        run = None if library is None else function_of(library)
        if library is None or run is None:
            x = super().forward(x)
            return x if self.slope is None else nn.functional.leaky_relu(x, self.slope)
        pixels = x.permute(0, 2, 3, 1).contiguous()
        _kept, described = self._describe(library, pixels)  # C reads the weight that it holds
        target = described.target
        output = pixels.new_empty(len(pixels), target.height, target.width, target.channels)
        start, end, taken = pixels.data_ptr(), output.data_ptr(), ctypes.c_int64(0)

        def take() -> None:
            check_status(run(described, start, end, ctypes.byref(taken)))

        parts = -(-target.height // described.rows) * -(-target.channels // described.columns)
        run_together(take, len(pixels) * parts)
        return output.permute(0, 3, 1, 2)

    def _library_for(self, x: Tensor) -> FloatLibrary | None:
        """Return the library if the layer can run on x there, else None."""
        if x.dtype != torch.float32 or x.ndim != 4 or not runs_packed(x, self.weight):
            return None
        padding = cast("tuple[int, int]", self.padding)[0]
        if x.shape[1] != self.in_channels or min(x.shape[2:]) + 2 * padding < self.kernel_size[0]:
            return None
        return load() if self._library is None else self._library

    def _describe(self, library: FloatLibrary, pixels: Tensor) -> tuple[_Packed, Convolution]:
        """Return the packed weight and its description for images (B, H, W, C); safe to call in several threads."""
        key, packed = state_of(self.weight, *([] if self.bias is None else [self.bias])), self._ready
        if packed is None or packed.key != key:
            with torch.inference_mode(False):
                packed = self._ready = self._pack(library, key)
        size = tuple(pixels.shape[:3])
        described = packed.described.get(size)
        if described is None:
            described = self._description(library, packed, pixels.shape)
            if len(packed.described) >= _SIZES:
                # Replaced as a whole, since other threads may be reading the dictionary.
                packed = self._ready = packed._replace(described={})
            packed.described[size] = described
        return packed, described

    @property
    def _transformed(self) -> bool:
        return self.kernel_size == (3, 3) and self.stride == (1, 1)

    def _pack(self, library: FloatLibrary, key: tuple) -> _Packed:
        """Pack the weight as one matrix of the kernel's pixels, or as 16 matrices of its transform."""
        weight = self.weight.detach()
        if self._transformed:
            g = torch.tensor(_TRANSFORM, dtype=torch.float64, device=weight.device)
            matrices = torch.einsum("ia,ncab,jb->ijnc", g, weight.double(), g).float().flatten(0, 1)
        else:
            matrices = weight.permute(0, 2, 3, 1).flatten(1)[None]
        size = library.packed_bytes(matrices.shape[2], matrices.shape[1]) // 4
        # Allocated explicitly on the weight's device: C writes here and must not see torch's default device or dtype.
        packed = weight.new_empty(len(matrices), size)
        for matrix, place in zip(matrices, packed, strict=True):
            library.pack(matrix.contiguous(), place)
        bias = None
        if self.bias is not None:
            bias = weight.new_zeros(library.padded_columns(self.out_channels))
            bias[: self.out_channels] = self.bias.detach()
        return _Packed(key, packed, bias, {})

    def _description(self, library: FloatLibrary, packed: _Packed, shape: torch.Size) -> Convolution:
        batch, height, width, channels = shape
        (side, _), (step, _), (padding, _) = self.kernel_size, self.stride, cast("tuple[int, int]", self.padding)
        rows, columns = ((n + 2 * padding - side) // step + 1 for n in (height, width))
        inputs = channels if self._transformed else side * side * channels
        bias = None if packed.bias is None else packed.bias.data_ptr()
        # An even number of blocks of equal size lets two threads finish at the same time.
        block = even_rows(-(-rows // 2), max(1, _PIXELS // (2 * columns)))
        blocks = batch * -(-rows // (2 * block))
        parts = max(1, min(_BLOCKS // blocks, self.out_channels // _COLUMNS))
        return Convolution(
            batch,
            _Image(height, width, channels, channels),
            _Image(rows, columns, self.out_channels, self.out_channels),
            FloatLayer(inputs, self.out_channels, packed.weight.data_ptr(), bias),
            _Kernel(side, step, padding),
            self._transformed,
            0 if self.slope is None else _LEAKY,
            self.slope or 0.0,
            2 * block,
            library.padded_columns(-(-self.out_channels // parts)),
        )


def pack_float_convolutions(module: nn.Module) -> None:
    """Replace every convolution below a module that the C library computes, together with its leaky ReLU."""
    for name, child in list(module.named_children()):
        if type(child) is ConvLeakyReLU and FloatConv2d.computes(child.conv):
            setattr(module, name, FloatConvLeakyReLU(child))
        elif FloatConv2d.computes(child):
            setattr(module, name, FloatConv2d(child))
        else:
            pack_float_convolutions(child)


class FloatConvLeakyReLU(ConvLeakyReLU):
    """A ConvLeakyReLU that shares another one's parameters and runs in the C library where possible.

    Args:
        layer: The layer to replace; its parameters are shared.
    """

    def __init__(self, layer: ConvLeakyReLU) -> None:
        nn.Module.__init__(self)
        share_state(self, layer)
        self.conv = FloatConv2d(layer.conv, layer.negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, N, H', W')."""
        return self.conv(x)
