"""The Triton backend of multi-scale deformable attention: shape checks, allocation and kernel launches.

It runs on GPUs. For tests it also runs on a CPU, in Triton's interpreter (set TRITON_INTERPRET=1 before Python starts).
"""

import contextlib
import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .msda_reference import check_grad_output, check_shapes

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_WIDTH = 256
_MAX_SAMPLES = 256
# Older Triton compilers cannot take the level sizes as a tuple.
_OLDEST = (3, 3)
# Elements per program: 8 for each of its 128 threads, which in half precision is one 16-byte load.
_TILE = 1024
# In the interpreter, the cost of a program hardly depends on its size.
_INTERPRETED_TILE = 65536


class TritonKernels:
    """Multi-scale deformable attention on a GPU, for float32, float16 and bfloat16 values.

    Geometry, weights and sums are float32 whatever the values' dtype. Value gradients are accumulated by atomics, so
    two backward runs may differ in the last bits. A location that is NaN or infinite contributes zero.

    Raises:
        ImportError: Triton is not installed.
    """

    def __init__(self) -> None:
        from .msda_triton_kernels import backward_kernel, forward_kernel

        self._forward_kernel, self._backward_kernel = forward_kernel, backward_kernel
        # Triton has no public API for this (as of 3.7). A wrong answer only makes `supports` return False.
        self.interpreted = "Interpreted" in type(forward_kernel).__name__

    def supports(self, value: Tensor, sampling_locations: Tensor) -> bool:
        """Return whether `forward` and `backward` accept these inputs.

        They accept inputs on one GPU, none in float64, with at most 256 channels per head and 256 samples (levels times
        points) per query and head.
        """
        levels, points = sampling_locations.shape[3:5]
        return (
            value.device.type == ("cpu" if self.interpreted else "cuda")
            and sampling_locations.device == value.device
            and value.dtype in _DTYPES
            and sampling_locations.dtype in _DTYPES
            and 1 <= value.shape[3] <= _MAX_HEAD_WIDTH
            and 1 <= levels * points <= _MAX_SAMPLES
            and value.shape[1] < 2**31
        )

    def forward(
        self, value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
    ) -> Tensor:
        """Sample every level bilinearly and sum with the attention weights.

        Args:
            value: (B, S, M, Dh) values of all levels, one level after the other.
            spatial_shapes: Height and width of each of the L levels, flat; their areas sum to S.
            sampling_locations: (B, Q, M, L, K, 2) xy in [0, 1] of each level; samples outside read zero.
            attention_weights: (B, Q, M, L, K) weights.

        Returns:
            (B, Q, M * Dh) in value's dtype.

        Raises:
            ValueError: The shapes do not fit together.
        """
        return self._run_forward(value, spatial_shapes, None, sampling_locations, attention_weights)

    def backward(
        self,
        grad_output: Tensor,
        value: Tensor,
        spatial_shapes: Sequence[int],
        sampling_locations: Tensor,
        attention_weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of `forward`.

        Args:
            grad_output: (B, Q, M * Dh) gradient of the output.
            value: (B, S, M, Dh) values given to `forward`.
            spatial_shapes: Height and width of each level, flat.
            sampling_locations: (B, Q, M, L, K, 2) locations given to `forward`.
            attention_weights: (B, Q, M, L, K) weights given to `forward`.

        Returns:
            Gradients of value, sampling_locations and attention_weights, each in its own dtype.

        Raises:
            ValueError: The shapes do not fit together.
        """
        gradients = self._run_backward(
            grad_output, value, spatial_shapes, None, sampling_locations, attention_weights, False
        )
        return gradients[0], gradients[2], gradients[3]

    def forward_fused(
        self,
        value: Tensor,
        spatial_shapes: Sequence[int],
        reference_points: Tensor,
        sampling_offsets: Tensor,
        attention_logits: Tensor,
    ) -> Tensor:
        """Compute `sampling_geometry` and `forward` in one kernel that keeps locations and weights in registers.

        Args:
            value: (B, S, M, Dh) values of all levels, one level after the other.
            spatial_shapes: Height and width of each of the L levels, flat; their areas sum to S.
            reference_points: (B, Q, L, 2) xy points or (B, Q, L, 4) cxcywh boxes, in [0, 1] of each level's map.
            sampling_offsets: (B, Q, M, L, K, 2) offsets, in the units of `sampling_geometry`.
            attention_logits: (B, Q, M, L, K) logits, normalized over L and K together.

        Returns:
            (B, Q, M * Dh) in value's dtype.

        Raises:
            ValueError: The shapes do not fit together.
        """
        return self._run_forward(value, spatial_shapes, reference_points, sampling_offsets, attention_logits)

    def backward_fused(
        self,
        grad_output: Tensor,
        value: Tensor,
        spatial_shapes: Sequence[int],
        reference_points: Tensor,
        sampling_offsets: Tensor,
        attention_logits: Tensor,
        reference_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the gradients of `forward_fused`.

        Args:
            grad_output: (B, Q, M * Dh) gradient of the output.
            value: (B, S, M, Dh) values given to `forward_fused`.
            spatial_shapes: Height and width of each level, flat.
            reference_points: (B, Q, L, 2) points or (B, Q, L, 4) cxcywh boxes.
            sampling_offsets: (B, Q, M, L, K, 2) offsets.
            attention_logits: (B, Q, M, L, K) logits.
            reference_gradient: Whether the reference points need a gradient.

        Returns:
            Gradients of value, reference_points (empty if not needed), sampling_offsets and attention_logits, each in
            its own dtype.

        Raises:
            ValueError: The shapes do not fit together.
        """
        return self._run_backward(
            grad_output, value, spatial_shapes, reference_points, sampling_offsets, attention_logits, reference_gradient
        )

    def _run_forward(
        self, value: Tensor, spatial_shapes: Sequence[int], references: Tensor | None, places: Tensor, scores: Tensor
    ) -> Tensor:
        sizes, constants = self._describe(value, spatial_shapes, references, places, scores)
        batch, tokens, heads, width = value.shape
        queries = places.shape[1]
        output = value.new_empty(batch, queries, heads * width)
        rows = batch * queries * heads
        if rows:
            places = places.contiguous()
            with _on(value):
                self._forward_kernel[(-(-rows // constants["ROWS"]),)](
                    value.contiguous(),
                    places,
                    scores.contiguous(),
                    places if references is None else references.contiguous(),
                    output,
                    sizes,
                    tokens,
                    queries,
                    rows,
                    **constants,
                )
        return output

    def _run_backward(
        self,
        grad_output: Tensor,
        value: Tensor,
        spatial_shapes: Sequence[int],
        references: Tensor | None,
        places: Tensor,
        scores: Tensor,
        reference_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sizes, constants = self._describe(value, spatial_shapes, references, places, scores)
        batch, tokens, heads, _ = value.shape
        queries = places.shape[1]
        check_grad_output(grad_output, value, places)
        grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
        grad_places = torch.empty_like(places, memory_format=torch.contiguous_format)
        grad_scores = torch.empty_like(scores, memory_format=torch.contiguous_format)
        asked = references is not None and reference_gradient
        grad_references = torch.zeros(
            references.shape if references is not None and asked else (0,), dtype=torch.float32, device=value.device
        )
        rows = batch * queries * heads
        if rows:
            places = places.contiguous()
            with _on(value):
                self._backward_kernel[(-(-rows // constants["ROWS"]),)](
                    grad_output.contiguous(),
                    value.contiguous(),
                    places,
                    scores.contiguous(),
                    places if references is None else references.contiguous(),
                    grad_value,
                    grad_places,
                    grad_scores,
                    grad_references,
                    sizes,
                    tokens,
                    queries,
                    rows,
                    REFERENCE_GRADIENT=asked,
                    **constants,
                )
        if references is not None:
            grad_references = grad_references.to(references.dtype)
        return grad_value.to(value.dtype), grad_references, grad_places, grad_scores

    def _describe(
        self, value: Tensor, spatial_shapes: Sequence[int], references: Tensor | None, places: Tensor, scores: Tensor
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Check the shapes; return the level sizes and the kernels' compile-time constants."""
        sizes = tuple(check_shapes(value, spatial_shapes, places, scores))
        batch, _, heads, width = value.shape
        queries, _, levels, points = places.shape[1:5]
        geometry = 0
        if references is not None:
            geometry = references.shape[-1]
            if geometry not in (2, 4) or tuple(references.shape[:-1]) != (batch, queries, levels):
                raise ValueError(
                    f"reference_points has shape {tuple(references.shape)}, but there are {queries} queries on "
                    f"{levels} levels: give ({batch}, {queries}, {levels}, 2 or 4)."
                )
        channels = _power_of_two(width)
        tile = _INTERPRETED_TILE if self.interpreted else _TILE
        constants = {
            "HEADS": heads,
            "WIDTH": width,
            "LEVELS": levels,
            "POINTS": points,
            "GEOMETRY": geometry,
            "ROWS": max(1, tile // channels),
            "CHANNELS": channels,
            "COLUMNS": _power_of_two(levels * points),
        }
        return sizes, constants


@functools.cache
def load() -> TritonKernels | None:
    """Load the kernels; None if Triton is missing or too old, with the reason logged once."""
    try:
        import triton

        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST:
            oldest = ".".join(map(str, _OLDEST))
            logger.warning(
                "Deformable attention does not use Triton %s, which is older than %s: pip install -U triton.",
                triton.__version__,
                oldest,
            )
            return None
        return TritonKernels()
    except Exception as error:  # a broken compiler must not break the model
        logger.info("The Triton kernels of deformable attention cannot be loaded: %s", error)
        return None


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _on(tensor: Tensor) -> Any:
    """Make the tensor's device current: Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
