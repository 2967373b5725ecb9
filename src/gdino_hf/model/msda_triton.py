"""The Triton backend of multi-scale deformable attention: checks, allocates and launches.

It runs on GPUs, and on a CPU in Triton's interpreter (TRITON_INTERPRET=1 set before Python starts), which is for tests.
"""

import contextlib
import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_WIDTH = 256
_MAX_SAMPLES = 256
# Sizes of levels travel as a tuple, which older compilers cannot take.
_OLDEST = (3, 3)
# Elements of a program's tile: with 128 threads, 8 for each, which in half precision are one 16-byte load.
_TILE = 1024
# A program in the interpreter costs the same whatever its size.
_INTERPRETED_TILE = 65536


class TritonKernels:
    """Multi-scale deformable attention on a GPU, for float32, float16 and bfloat16 values.

    Geometry, weights and sums are float32 whatever the values are. Value gradients are added by atomics, so two
    backward runs may differ in the last bits. A location that is NaN or infinite contributes zero.
    """

    def __init__(self) -> None:
        from .msda_triton_kernels import backward_kernel, forward_kernel

        self._forward_kernel, self._backward_kernel = forward_kernel, backward_kernel
        self.interpreted = "Interpreted" in type(forward_kernel).__name__

    def supports(self, value: Tensor, sampling_locations: Tensor) -> bool:
        """Whether these can run: on a GPU, at most 256 channels a head and 256 samples a query, none in float64."""
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
            value: (B, S, M, Dh).
            spatial_shapes: h0, w0, h1, w1, ... of the L levels; their areas sum to S.
            sampling_locations: (B, Q, M, L, K, 2) x, y in 0..1 of the level; outside is zero.
            attention_weights: (B, Q, M, L, K).

        Returns:
            (B, Q, M * Dh) in value's dtype.

        Raises:
            ValueError: the shapes do not fit together.
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
        """Gradients of `forward`: of value, locations and weights, each in the dtype of what it belongs to."""
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
        """`forward` with the softmax and the arithmetic of locations inside, so that neither is written to memory.

        Args:
            value, spatial_shapes: As in `forward`.
            reference_points: (B, Q, L, 2) points or (B, Q, L, 4) cxcywh boxes, in units of each level's map.
            sampling_offsets: (B, Q, M, L, K, 2), in cells around points, in half sides / K around boxes.
            attention_logits: (B, Q, M, L, K), before the softmax over L and K.

        Returns:
            (B, Q, M * Dh) in value's dtype.

        Raises:
            ValueError: the shapes do not fit together.
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
        """Gradients of `forward_fused`: of value, references (empty unless asked for), offsets and logits."""
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
        batch, tokens, heads, width = value.shape
        queries = places.shape[1]
        if tuple(grad_output.shape) != (batch, queries, heads * width):
            raise ValueError(
                f"grad_output has shape {tuple(grad_output.shape)}, give it the output's, "
                f"{(batch, queries, heads * width)}."
            )
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
        """Check every shape before a kernel sees a pointer; sizes of the levels and compile-time constants."""
        if value.dim() != 4 or places.dim() != 6 or tuple(places.shape[:-1]) != tuple(scores.shape):
            raise ValueError(
                f"value {tuple(value.shape)}, locations or offsets {tuple(places.shape)} and weights or logits "
                f"{tuple(scores.shape)} do not fit, give (B, S, M, Dh), (B, Q, M, L, K, 2) and (B, Q, M, L, K)."
            )
        batch, tokens, heads, width = value.shape
        _, queries, _, levels, points, axes = places.shape
        if places.shape[0] != batch or places.shape[2] != heads or axes != 2:
            raise ValueError(
                f"Locations or offsets have shape {tuple(places.shape)}, but value has {batch} items of {heads} heads: "
                f"give ({batch}, {queries}, {heads}, L, K, 2)."
            )
        sizes = tuple(int(size) for size in spatial_shapes)
        area = sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
        if len(sizes) != 2 * levels or min(sizes) < 0 or area != tokens:
            raise ValueError(
                f"spatial_shapes {list(sizes)} covers {area} tokens, but value has {tokens} on {levels} levels: "
                "give h and w of each level."
            )
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
    """The kernels, or None where Triton is missing or too old; the reason is logged once."""
    try:
        import triton

        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST:
            oldest = ".".join(map(str, _OLDEST))
            logger.warning("Deformable attention needs Triton %s, found %s: not used.", oldest, triton.__version__)
            return None
        return TritonKernels()
    except Exception as error:  # a broken compiler must not break the model
        logger.info("The Triton kernels of deformable attention cannot be loaded: %s", error)
        return None


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _on(tensor: Tensor) -> Any:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
