"""Deformable attention for inference on a CPU: one product for offsets and weights, the rest inside the C kernel."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..model.ms_deform_attn import MSDeformAttn
from ..model.msda_backends import requested_backend
from ..model.msda_c import CpuLibrary, load
from .int8_linear import Int8Linear
from .packed_linear import PackedLinear, runs_packed, side_by_side, state_of


class PackedMSDeformAttn(MSDeformAttn):
    """An MSDeformAttn with the same parameters, faster where its linear layers can run packed.

    Args:
        attention: The module to stand for; its parameters are shared.
        int8: Whether the linear layers multiply 8-bit numbers.
    """

    def __init__(self, attention: MSDeformAttn, int8: bool = False) -> None:
        nn.Module.__init__(self)
        self.num_levels, self.num_heads, self.num_points = (
            attention.num_levels,
            attention.num_heads,
            attention.num_points,
        )
        self._kind = Int8Linear if int8 else PackedLinear
        self.sampling_offsets, self.attention_weights = attention.sampling_offsets, attention.attention_weights
        self.value_proj, self.output_proj = self._kind(attention.value_proj), self._kind(attention.output_proj)
        self.custom_kernels = attention.custom_kernels
        self._joint: tuple[tuple, Any] | None = None
        self.train(attention.training)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_joint": None}

    def library_for(self, x: Tensor) -> CpuLibrary | None:
        """The C kernels if they may run on queries or values such as x."""
        may_run = runs_packed(x, self.value_proj.weight) and requested_backend() in ("auto", "c")
        return load() if may_run else None

    def forward(
        self,
        queries: Tensor,
        values: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        value_mask: Tensor | None = None,
    ) -> Tensor:
        """As in `MSDeformAttn.forward`."""
        library = self.library_for(queries)
        if library is None:
            return super().forward(queries, values, reference_points, spatial_shapes, value_mask)
        projected = self.joint_projection()(queries)
        return self.output_proj(self.sample(library, projected, values, reference_points, spatial_shapes, value_mask))

    def sample(
        self,
        library: CpuLibrary,
        projected: Tensor,
        values: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        value_mask: Tensor | None,
    ) -> Tensor:
        """What the heads read, before the output projection: (B, Q, D).

        Args:
            library: From `library_for`.
            projected: (B, Q, 3 * M * L * K) of the queries, by `joint_projection`.
            values, reference_points, spatial_shapes, value_mask: As in `MSDeformAttn.forward`.
        """
        value = self.value_proj(values)
        if value_mask is not None:
            value = value.masked_fill(~value_mask[..., None], 0.0)
        sides = [side for shape in spatial_shapes for side in shape]
        heads = value.unflatten(-1, (self.num_heads, -1))
        return library.forward_projected(heads, sides, projected, reference_points, self.num_points)

    def joint_projection(self) -> Any:
        """Offsets and attention weights as one layer, made anew when either changes."""
        parts = (self.sampling_offsets, self.attention_weights)
        key = state_of(*(x for part in parts for x in (part.weight, part.bias)))
        if self._joint is None or self._joint[0] != key:
            # In a tuple, so that it does not become a sub-module with weights of its own.
            self._joint = (key, side_by_side(parts, self._kind))
        return self._joint[1]
