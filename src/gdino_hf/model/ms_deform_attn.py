"""Multi-scale deformable attention (Zhu et al. 2021, arXiv:2010.04159, equation 3): the reference and the module.

    MSDeformAttn(z_q, p_q, {x^l}) = sum_m W_m [ sum_l sum_k A_mlqk * W'_m x^l(phi_l(p_q) + dp_mlqk) ]

A_mlqk are softmax weights over the L * K samples of a head, dp the sampling offsets, both linear in the query z_q; x^l
is read by bilinear interpolation with zeros outside.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .msda_backends import ms_deform_attn


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

        # Half precision places a sample up to a pixel off at the far side of a large map: geometry stays float32.
        offsets = self.sampling_offsets(queries).float().view(batch_size, num_queries, heads, levels, points, 2)
        weights = self.attention_weights(queries).view(batch_size, num_queries, heads, levels * points)
        weights = weights.softmax(-1, dtype=torch.float32).unflatten(-1, (levels, points))
        centers = reference_points[:, :, None, :, None, :2]
        if reference_points.shape[-1] == 2:
            sizes = [(width, height) for height, width in spatial_shapes]
            normalizer = torch.tensor(sizes, dtype=torch.float32, device=offsets.device)[:, None]
            locations = centers + offsets / normalizer
        else:
            locations = centers + offsets / points * reference_points[:, :, None, :, None, 2:] * 0.5
        output = ms_deform_attn(value, [side for shape in spatial_shapes for side in shape], locations, weights)
        return self.output_proj(output)

    def initial_offsets(self) -> Tensor:
        """Bias that starts each head looking in its own direction, point k at distance k + 1 (Zhu et al. 2021, A.4)."""
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        grid = direction[:, None, None, :] * distance[None, None, :, None]
        return grid.expand(-1, self.num_levels, -1, -1).reshape(-1)
