"""Deformable attention for inference on a CPU: one product for offsets and weights, the rest inside the C kernel."""

from collections.abc import Sequence

from torch import Tensor, nn

from .ms_deform_attn import MSDeformAttn
from .msda_backends import requested_backend
from .msda_c import load
from .packed_linear import PackedLinear, runs_packed, side_by_side, state_of


class PackedMSDeformAttn(MSDeformAttn):
    """An MSDeformAttn with the same parameters, faster where its linear layers can run packed.

    Args:
        attention: The module to stand for; its parameters are shared.
    """

    def __init__(self, attention: MSDeformAttn) -> None:
        nn.Module.__init__(self)
        self.num_levels, self.num_heads, self.num_points = (
            attention.num_levels,
            attention.num_heads,
            attention.num_points,
        )
        self.sampling_offsets, self.attention_weights = attention.sampling_offsets, attention.attention_weights
        self.value_proj, self.output_proj = PackedLinear(attention.value_proj), PackedLinear(attention.output_proj)
        self.custom_kernels = attention.custom_kernels
        self._joint: tuple[tuple, PackedLinear] | None = None
        self.train(attention.training)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_joint": None}

    def forward(
        self,
        queries: Tensor,
        values: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        value_mask: Tensor | None = None,
    ) -> Tensor:
        """As in `MSDeformAttn.forward`."""
        packed = runs_packed(queries, self.value_proj.weight) and requested_backend() in ("auto", "c")
        library = load() if packed else None
        if library is None:
            return super().forward(queries, values, reference_points, spatial_shapes, value_mask)
        value = self.value_proj(values)
        if value_mask is not None:
            value = value.masked_fill(~value_mask[..., None], 0.0)
        projected = self._joint_projection()(queries)
        output = library.forward_projected(
            value.unflatten(-1, (self.num_heads, -1)),
            [side for shape in spatial_shapes for side in shape],
            projected,
            reference_points,
            self.num_points,
        )
        return self.output_proj(output)

    def _joint_projection(self) -> PackedLinear:
        """Offsets and attention weights as one layer, made anew when either changes."""
        parts = (self.sampling_offsets, self.attention_weights)
        key = state_of(*(x for part in parts for x in (part.weight, part.bias)))
        if self._joint is None or self._joint[0] != key:
            # In a tuple, so that it does not become a sub-module with weights of its own.
            self._joint = (key, side_by_side(parts))
        return self._joint[1]
