"""Layers for the kernels package's `kernelize`: stateless modules whose forward replaces another module's."""

from torch import Tensor, nn

from .operator import ms_deform_attn


class MultiScaleDeformableAttention(nn.Module):
    """Takes the place of transformers' MultiScaleDeformableAttention, in any model that has one."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """Sample and sum.

        Args:
            value: (B, S, M, Dh).
            value_spatial_shapes: (L, 2) height and width of each level; the list is read instead, which waits for no
                device.
            value_spatial_shapes_list: The same as tuples.
            level_start_index: (L,), unused: levels lie one after the other.
            sampling_locations: (B, Q, M, L, K, 2) x, y in 0..1 of the level.
            attention_weights: (B, Q, M, L, K).
            im2col_step: Unused: batches need no cutting.

        Returns:
            (B, Q, M * Dh).
        """
        shapes = [side for shape in value_spatial_shapes_list for side in shape]
        return ms_deform_attn(value, shapes, sampling_locations, attention_weights)
