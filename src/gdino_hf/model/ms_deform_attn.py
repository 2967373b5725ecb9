"""Multi-scale deformable attention (Zhu et al. 2021, arXiv:2010.04159, equation 3): the reference and the module.

    MSDeformAttn(z_q, p_q, {x^l}) = sum_m W_m [ sum_l sum_k A_mlqk * W'_m x^l(phi_l(p_q) + dp_mlqk) ]

A_mlqk are softmax weights over the L * K samples of a head, dp the sampling offsets, both linear in the query z_q; x^l
is read by bilinear interpolation with zeros outside.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .msda_backends import ms_deform_attn, ms_deform_attn_reference
from .msda_fused import ms_deform_attn_fused, prefers_fused, sampling_geometry


class MSDeformAttn(nn.Module):
    """Attend from each query to a few sampled points of every feature level.

    Args:
        d_model: Width D.
        num_levels: Levels L.
        num_heads: Heads M; D must be a multiple.
        num_points: Sampled points K per head and level.
    """

    def __init__(self, d_model: int, num_levels: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        self.custom_kernels = True  # False: PyTorch's operations only
        self.sampling_offsets = nn.Linear(d_model, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(d_model, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)

    def forward(
        self,
        queries: Tensor,
        values: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        value_mask: Tensor | None = None,
    ) -> Tensor:
        """Sample the values around each query's reference.

        Args:
            queries: (B, Q, D) with their position embedding added.
            values: (B, S, D) features of all levels, one after the other.
            reference_points: (B or 1, Q, L, 2) points or (B or 1, Q, L, 4) cxcywh boxes, float32, in units of
                each level's padded map.
            spatial_shapes: (height, width) of each level; their products sum to S.
            value_mask: (B, S) bool, True on real tokens; the others count as zero. None if all are real.

        Returns:
            (B, Q, D).
        """
        batch_size, num_queries, _ = queries.shape
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        value = self.value_proj(values)
        if value_mask is not None:
            value = value.masked_fill(~value_mask[..., None], 0.0)
        value = value.unflatten(-1, (heads, -1))

        offsets = self.sampling_offsets(queries).view(batch_size, num_queries, heads, levels, points, 2)
        logits = self.attention_weights(queries).view(batch_size, num_queries, heads, levels, points)
        sizes = [side for shape in spatial_shapes for side in shape]
        if self.custom_kernels and prefers_fused(value.device.type):
            output = ms_deform_attn_fused(value, sizes, reference_points, offsets, logits)
        else:
            operator = ms_deform_attn if self.custom_kernels else ms_deform_attn_reference
            output = operator(value, sizes, *sampling_geometry(sizes, reference_points, offsets, logits))
        return self.output_proj(output)

    def initial_offsets(self) -> Tensor:
        """Bias that starts each head looking in its own direction, point k at distance k + 1 (Zhu et al. 2021, A.4)."""
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        grid = direction[:, None, None, :] * distance[None, None, :, None]
        return grid.expand(-1, self.num_levels, -1, -1).reshape(-1)
