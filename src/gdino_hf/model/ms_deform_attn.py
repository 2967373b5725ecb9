"""The module of multi-scale deformable attention (Zhu et al. 2021, arXiv:2010.04159, equation 3).

    MSDeformAttn(z_q, p_q, {x^l}) = sum_m W_m [ sum_l sum_k A_mlqk * W'_m x^l(phi_l(p_q) + dp_mlqk) ]

z_q is a query, p_q its reference point and x^l the feature map of level l. The sampling offsets dp_mlqk and the logits
of the attention weights A_mlqk are linear in z_q; the weights are a softmax over the L * K samples of a head m. x^l is
read by bilinear interpolation, with zeros outside. W'_m is `value_proj`, W_m is `output_proj`, and phi_l scales the
reference point to level l.

The sums are computed by an operator with several backends: msda_reference.py has the plain version.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .msda_backends import prefers_fused
from .msda_operator import ms_deform_attn, ms_deform_attn_fused
from .msda_reference import ms_deform_attn_reference, sampling_geometry


class MSDeformAttn(nn.Module):
    """Attention from each query to a few sampled points of every feature level.

    Args:
        d_model: Width D of queries and values.
        num_levels: Number of feature levels L.
        num_heads: Number of heads M; D must be a multiple of it.
        num_points: Number of points K sampled per head and level.
    """

    def __init__(self, d_model: int, num_levels: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        self.custom_kernels = True  # False restricts the module to PyTorch's own operations
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
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Sample the values around each query's reference point and sum them.

        Args:
            queries: (B, Q, D) queries, with their position embedding added.
            values: (B, S, D) features of all levels, one level after the other.
            reference_points: (B or 1, Q, L, 2) xy points or (B or 1, Q, L, 4) cxcywh boxes, float32, in [0, 1] of
                each level's padded map.
            spatial_shapes: (height, width) of each level; their areas sum to S.
            value_mask: (B, S) bool, True on real tokens; padded tokens count as zero. None if all tokens are real.
            output_attentions: Whether to return the attention weights, too.

        Returns:
            (B, Q, D) attended features, and the (B, Q, M, L, K) attention weights or None.
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
        if self.custom_kernels and not output_attentions and prefers_fused(value.device.type):
            # Images without padding share one row of reference points, but the fused operator takes one per image.
            references = reference_points.expand(batch_size, -1, -1, -1)
            return self.output_proj(ms_deform_attn_fused(value, sizes, references, offsets, logits)), None
        operator = ms_deform_attn if self.custom_kernels else ms_deform_attn_reference
        locations, weights = sampling_geometry(sizes, reference_points, offsets, logits)
        output = self.output_proj(operator(value, sizes, locations, weights))
        return output, weights if output_attentions else None

    def initial_offsets(self) -> Tensor:
        """Compute the initial bias of `sampling_offsets` (Zhu et al. 2021, appendix A.4).

        Each head starts looking in its own direction, with its point k at a distance of k + 1 cells.

        Returns:
            (M * L * K * 2,) float32.
        """
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        grid = direction[:, None, None, :] * distance[None, None, :, None]
        return grid.expand(-1, self.num_levels, -1, -1).reshape(-1)
