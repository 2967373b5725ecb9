"""The C backend of multi-scale deformable attention, a compiled library called through ctypes.

The library is built from kernels/msda/cpu when gdino-hf is installed, as an optional extension. It depends on neither
torch nor Python, so it is a single file: the one that the environment variable GDINO_MSDA_LIBRARY names, otherwise
`_msda_cpu*` in the folder of the installed gdino_hf. Without it, `load` logs one line and returns None.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

# torch is imported before the library is loaded, so that both share one OpenMP runtime and its threads.
import torch

from .compiled_libraries import find_compiled
from .msda_reference import check_grad_output, check_shapes

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
    """The compiled functions of multi-scale deformable attention, for float32 and bfloat16 values on a CPU.

    Geometry, weights and sums are float32 whatever the values' dtype. Results are bit-equal from run to run and for
    any number of threads. A location that is NaN or infinite contributes zero, like one far outside the map.

    Args:
        path: The shared library.

    Raises:
        OSError: The file is not a library that can be loaded here.
        AttributeError: The library lacks one of the functions.
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
        """Instruction set in use: "avx512", "avx2" or "baseline"."""
        return self._library.msda_isa().decode()

    @property
    def has_threads(self) -> bool:
        """Whether the library was compiled with OpenMP."""
        return bool(self._library.msda_has_threads())

    def limit_isa(self, isa: str) -> None:
        """Restrict the library to instruction sets up to `isa`, for tests and benchmarks; "avx512" lifts the limit."""
        self._library.msda_limit_isa(("baseline", "avx2", "avx512").index(isa))

    @staticmethod
    def supports(value: torch.Tensor, sampling_locations: torch.Tensor) -> bool:
        """Return whether `forward` and `backward` accept these inputs.

        They accept float32 and bfloat16 values on a CPU with at most 256 channels per head and 256 samples (levels
        times points) per query and head.
        """
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
            value: (B, S, M, Dh) float32 or bfloat16 values of all levels, one level after the other.
            spatial_shapes: Height and width of each of the L levels, flat; their areas sum to S.
            sampling_locations: (B, Q, M, L, K, 2) xy in [0, 1] of each level; samples outside read zero.
            attention_weights: (B, Q, M, L, K) weights.

        Returns:
            (B, Q, M * Dh) in value's dtype, or None if `supports` returns False.

        Raises:
            ValueError: The shapes do not fit together.
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
        """Compute `sampling_geometry` and `forward` in one pass that keeps locations and weights out of memory.

        Args:
            value: (B, S, M, Dh) float32 or bfloat16 values on a CPU, with Dh at most 256.
            spatial_shapes: Height and width of each of the L levels, flat; their areas sum to S.
            projected: (B, Q, 3 * M * L * K), each query's offsets (M, L, K, 2) followed by its logits (M, L, K).
            reference_points: (B or 1, Q, L, 2) xy points or (B or 1, Q, L, 4) cxcywh boxes, in [0, 1] of each level.
            points: Number of points K; L * K is at most 256.

        Returns:
            (B, Q, M * Dh) in value's dtype.

        Raises:
            ValueError: The shapes do not fit together.
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
                f"{tuple(reference_points.shape)} and spatial_shapes {sizes} do not fit together: give "
                "(B, S, M, Dh), (B, Q, 3 * M * L * K), (B or 1, Q, L, 2 or 4) and the height and width of each level, "
                "with areas that sum to S."
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
        """Compute the gradients of `forward`.

        Args:
            grad_output: (B, Q, M * Dh) gradient of the output.
            value: (B, S, M, Dh) values given to `forward`.
            spatial_shapes: Height and width of each level, flat.
            sampling_locations: (B, Q, M, L, K, 2) locations given to `forward`.
            attention_weights: (B, Q, M, L, K) weights given to `forward`.

        Returns:
            Gradients of value, sampling_locations and attention_weights, each in its own dtype, or None if `supports`
            returns False.

        Raises:
            ValueError: The shapes do not fit together.
        """
        if not self.supports(value, sampling_locations):
            return None
        shape, sizes = _describe(value, spatial_shapes, sampling_locations, attention_weights)
        check_grad_output(grad_output, value, sampling_locations)
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
    """Load the compiled library; None if it is missing or unusable, with the reason logged once."""
    path = find_library()
    if path is None:
        logger.warning(
            "Deformable attention on a CPU runs on PyTorch's own operations (GDINO_MSDA=torch): its C kernels, "
            "which are several times faster, are not built here. Reinstall gdino-hf on a machine with a C compiler."
        )
        return None
    try:
        return CpuLibrary(path)
    except (OSError, AttributeError) as error:
        logger.warning("The C kernels of deformable attention cannot be loaded from %s: %s", path, error)
        return None


def find_library() -> Path | None:
    """Return the path in GDINO_MSDA_LIBRARY, or else of the library in the installed gdino_hf, or None."""
    named = os.environ.get(_LIBRARY_VARIABLE)
    if named:
        return Path(named)
    return find_compiled("_msda_cpu")


def _describe(
    value: torch.Tensor, spatial_shapes: Sequence[int], locations: torch.Tensor, weights: torch.Tensor
) -> tuple[_Shape, ctypes.Array]:
    """Check the shapes and return them in the form that the C functions take."""
    sizes = check_shapes(value, spatial_shapes, locations, weights)
    batch, tokens, heads, width = value.shape
    queries, _, levels, points = locations.shape[1:5]
    shape = _Shape(batch, tokens, heads, width, queries, levels, points, _DTYPES[value.dtype], torch.get_num_threads())
    return shape, (ctypes.c_int64 * len(sizes))(*sizes)


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def _pointers(*tensors: torch.Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _check(status: int) -> None:
    if status == 2:
        raise MemoryError("The C kernels of deformable attention ran out of memory: use a smaller batch or image.")
    if status:
        raise RuntimeError(f"The C kernels of deformable attention refused their arguments (status {status}).")
