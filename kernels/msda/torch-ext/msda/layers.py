"""Layers for `kernelize` of the kernels package: stateless modules whose forward replaces another module's."""

from torch import Tensor, nn

from .operator import ms_deform_attn


class MultiScaleDeformableAttention(nn.Module):
    """Replacement for transformers' module of the same name, in any model that has one."""

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
        """Sample every level bilinearly and sum with the attention weights.

        Args:
            value: (B, S, M, Dh) values of all levels, one level after the other.
            value_spatial_shapes: (L, 2) height and width of each level. Unused: reading it would wait for the device.
            value_spatial_shapes_list: (height, width) of each level as integers.
            level_start_index: (L,) first token of each level. Unused: it follows from the sizes.
            sampling_locations: (B, Q, M, L, K, 2) xy in [0, 1] of each level.
            attention_weights: (B, Q, M, L, K) weights.
            im2col_step: Number of images that other kernels process at once. Unused.

        Returns:
            (B, Q, M * Dh) in value's dtype.
        """
        shapes = [side for shape in value_spatial_shapes_list for side in shape]
        return ms_deform_attn(value, shapes, sampling_locations, attention_weights)
