"""The C backend of multi-scale deformable attention: finds the compiled library and calls it through ctypes.

The library is built from kernels/msda/cpu into the installed package as an optional extension. It knows nothing of
torch or Python, so one file is all there is to find: the path in the environment variable GDINO_MSDA_LIBRARY if set,
otherwise `_msda_cpu*` inside the folder of an installed gdino_hf. No library means one log line and `load()` is None.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

# torch comes first: the library shares torch's copy of the OpenMP run time, and with it torch's threads.
import torch

from .compiled_libraries import find_compiled

logger = logging.getLogger(__name__)

_LIBRARY_VARIABLE = "GDINO_MSDA_LIBRARY"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_MAX_HEAD_WIDTH = 256
_MAX_POINTS = 256


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("B", "S", "M", "D", "Q", "L", "K")] + [
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


class CpuLibrary:
    """Multi-scale deformable attention in C, for float32 and bfloat16 values on a CPU.

    Geometry, weights and sums are float32 whatever the values are. Results do not depend on the number of threads,
    and two runs give the same bits. A location that is NaN or infinite contributes zero, as one far outside does.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        for name, pointers in (("msda_forward", 5), ("msda_backward", 8)):
            function = getattr(self._library, name)
            function.argtypes = [ctypes.POINTER(_Shape)] + [ctypes.c_void_p] * pointers
            function.restype = ctypes.c_int
        projected = self._library.msda_forward_projected
        projected.argtypes = [ctypes.POINTER(_Shape)] + [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2 + [ctypes.c_void_p]
        projected.restype = ctypes.c_int
        self._library.msda_isa.restype = ctypes.c_char_p

    @property
    def isa(self) -> str:
        """Instruction set the calls run on here: "avx512", "avx2" or "baseline"."""
        return self._library.msda_isa().decode()

    @property
    def has_threads(self) -> bool:
        """Whether the library was compiled with OpenMP."""
        return bool(self._library.msda_has_threads())

    def limit_isa(self, isa: str) -> None:
        """Allow instruction sets up to `isa` only, for tests and measurements; "avx512" allows all."""
        self._library.msda_limit_isa(("baseline", "avx2", "avx512").index(isa))

    @staticmethod
    def supports(value: torch.Tensor, sampling_locations: torch.Tensor) -> bool:
        """Whether `forward` and `backward` take these: a CPU, float32 or bfloat16, at most 256 channels and points."""
        levels, points = sampling_locations.shape[3:5]
        return (
            value.device.type == "cpu"
            and sampling_locations.device.type == "cpu"
            and value.dtype in _DTYPES
            and sampling_locations.dtype != torch.float64
            and 1 <= value.shape[3] <= _MAX_HEAD_WIDTH
            and 1 <= levels * points <= _MAX_POINTS
            and value.shape[1] * (value.shape[3] + 15) < 2**31
        )

    def forward(
        self,
        value: torch.Tensor,
        spatial_shapes: Sequence[int],
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
    ) -> torch.Tensor | None:
        """Sample every level bilinearly and sum with the attention weights.

        Args:
            value: (B, S, M, Dh) float32 or bfloat16, the levels' tokens one after the other.
            spatial_shapes: h0, w0, h1, w1, ... of the L levels; their areas sum to S.
            sampling_locations: (B, Q, M, L, K, 2) x, y in 0..1 of the level; outside is zero.
            attention_weights: (B, Q, M, L, K).

        Returns:
            (B, Q, M * Dh) in value's dtype, or None where `supports` says no.

        Raises:
            ValueError: the shapes do not fit together.
        """
        if not self.supports(value, sampling_locations):
            return None
        shape, sizes = _describe(value, spatial_shapes, sampling_locations, attention_weights)
        value = value.detach().contiguous()
        locations = _float32(sampling_locations)
        weights = _float32(attention_weights)
        out = value.new_empty((shape.B, shape.Q, shape.M * shape.D))
        _check(self._library.msda_forward(shape, sizes, *_pointers(value, locations, weights, out)))
        return out

    def forward_projected(
        self,
        value: torch.Tensor,
        spatial_shapes: Sequence[int],
        projected: torch.Tensor,
        reference_points: torch.Tensor,
        points: int,
    ) -> torch.Tensor:
        """`forward` with the softmax and the offsets' arithmetic inside: nothing of either is written to memory.

        Args:
            value: (B, S, M, Dh) float32 or bfloat16, on a CPU, Dh <= 256.
            spatial_shapes: h0, w0, h1, w1, ... of the L levels; their areas sum to S.
            projected: (B, Q, 3 * M * L * K), the offsets (M, L, K, 2) of each query, then its logits (M, L, K).
            reference_points: (B or 1, Q, L, 2) points or (B or 1, Q, L, 4) cxcywh boxes, in 0..1 of the level.
            points: K; L * K <= 256.

        Returns:
            (B, Q, M * Dh) in value's dtype.

        Raises:
            ValueError: the shapes do not fit together.
        """
        batch, tokens, heads, width = value.shape
        rows, queries, levels, axes = reference_points.shape
        sizes = [int(size) for size in spatial_shapes]
        if (
            tuple(projected.shape) != (batch, queries, 3 * heads * levels * points)
            or rows not in (1, batch)
            or axes not in (2, 4)
            or len(sizes) != 2 * levels
            or sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True)) != tokens
        ):
            raise ValueError(
                f"value {tuple(value.shape)}, projected {tuple(projected.shape)}, reference_points "
                f"{tuple(reference_points.shape)} and spatial_shapes {sizes} do not fit, give (B, S, M, Dh), "
                "(B, Q, 3 * M * L * K), (B or 1, Q, L, 2 or 4) and h, w of each level with areas that sum to S."
            )
        threads = torch.get_num_threads()
        shape = _Shape(batch, tokens, heads, width, queries, levels, points, _DTYPES[value.dtype], threads)
        value = value.detach().contiguous()
        inputs = _float32(projected), _float32(reference_points)
        out = value.new_empty((batch, queries, heads * width))
        areas = (ctypes.c_int64 * len(sizes))(*sizes)
        run = self._library.msda_forward_projected
        _check(run(shape, areas, *_pointers(value, *inputs), axes, rows, *_pointers(out)))
        return out

    def backward(
        self,
        grad_output: torch.Tensor,
        value: torch.Tensor,
        spatial_shapes: Sequence[int],
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Gradients of `forward`, each in the dtype of what it belongs to.

        Args:
            grad_output: (B, Q, M * Dh), gradient of the output.
            value, spatial_shapes, sampling_locations, attention_weights: as given to `forward`.

        Returns:
            grad_value (B, S, M, Dh), grad_locations (B, Q, M, L, K, 2) and grad_weights (B, Q, M, L, K), or None
            where `supports` says no.

        Raises:
            ValueError: the shapes do not fit together.
        """
        if not self.supports(value, sampling_locations):
            return None
        shape, sizes = _describe(value, spatial_shapes, sampling_locations, attention_weights)
        if tuple(grad_output.shape) != (shape.B, shape.Q, shape.M * shape.D):
            raise ValueError(
                f"grad_output has shape {tuple(grad_output.shape)}, give it the output's, "
                f"{(shape.B, shape.Q, shape.M * shape.D)}."
            )
        value = value.detach().contiguous()
        grad_output = grad_output.detach().to(value.dtype).contiguous()
        locations = _float32(sampling_locations)
        weights = _float32(attention_weights)
        grad_value = torch.empty_like(value)
        grad_locations = torch.empty_like(locations)
        grad_weights = torch.empty_like(weights)
        tensors = (value, locations, weights, grad_output, grad_value, grad_locations, grad_weights)
        _check(self._library.msda_backward(shape, sizes, *_pointers(*tensors)))
        return grad_value, grad_locations.to(sampling_locations.dtype), grad_weights.to(attention_weights.dtype)


@functools.cache
def load() -> CpuLibrary | None:
    """The compiled library, or None where there is none; the reason is logged once."""
    path = find_library()
    if path is None:
        logger.warning(
            "Deformable attention on a CPU runs by PyTorch's own operations (GDINO_MSDA=torch): its C kernels, several "
            "times faster, are not built here. Install gdino-hf again where there is a C compiler."
        )
        return None
    try:
        return CpuLibrary(path)
    except (OSError, AttributeError) as error:
        logger.warning("The C kernels of deformable attention cannot be loaded from %s: %s", path, error)
        return None


def find_library() -> Path | None:
    """Where the library lies: the file GDINO_MSDA_LIBRARY names, else one in the folder of an installed gdino_hf."""
    named = os.environ.get(_LIBRARY_VARIABLE)
    if named:
        return Path(named)
    return find_compiled("_msda_cpu")


def _describe(
    value: torch.Tensor, spatial_shapes: Sequence[int], locations: torch.Tensor, weights: torch.Tensor
) -> tuple[_Shape, ctypes.Array]:
    """Check every shape before C sees a pointer."""
    if value.dim() != 4 or locations.dim() != 6 or tuple(locations.shape[:-1]) != tuple(weights.shape):
        raise ValueError(
            f"value {tuple(value.shape)}, sampling_locations {tuple(locations.shape)} and attention_weights "
            f"{tuple(weights.shape)} do not fit, give (B, S, M, Dh), (B, Q, M, L, K, 2) and (B, Q, M, L, K)."
        )
    batch, tokens, heads, width = value.shape
    _, queries, _, levels, points, axes = locations.shape
    if locations.shape[0] != batch or locations.shape[2] != heads or axes != 2:
        raise ValueError(
            f"sampling_locations has shape {tuple(locations.shape)}, but value has {batch} items of {heads} heads: "
            f"give ({batch}, {queries}, {heads}, L, K, 2)."
        )
    sizes = [int(size) for size in spatial_shapes]
    area = sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
    if len(sizes) != 2 * levels or min(sizes) < 0 or area != tokens:
        raise ValueError(
            f"spatial_shapes {sizes} covers {area} tokens, but value has {tokens} on {levels} levels: "
            "give h and w of each level."
        )
    shape = _Shape(batch, tokens, heads, width, queries, levels, points, _DTYPES[value.dtype], torch.get_num_threads())
    return shape, (ctypes.c_int64 * len(sizes))(*sizes)


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def _pointers(*tensors: torch.Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _check(status: int) -> None:
    if status == 2:
        raise MemoryError("The C kernels of deformable attention ran out of memory, use a smaller batch or image.")
    if status:
        raise RuntimeError(f"The C kernels of deformable attention refused their arguments (status {status}).")
