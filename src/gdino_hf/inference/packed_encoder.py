"""The deformable encoder layer on a CPU, in two passes over the image tokens.

The first pass projects each block of tokens to values, offsets and logits. The second one samples for a block of
tokens and carries them through the rest of the layer. Between the two, all values must be there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..model.encoder import DeformableLayer
from .compiled_layers import finish_layer, weights_for
from .packed_attention import PackedMSDeformAttn, rows_at_once
from .packed_linear import PackedLinear, share_state
from .workers import RowBlocks, run_rows


class PackedDeformableLayer(DeformableLayer):
    """A DeformableLayer that shares another one's parameters and runs on packed weights where possible.

    Args:
        layer: The layer to replace, whose activation is ReLU; its parameters are shared.
        kind: Class of its linear layers.
    """

    self_attn: PackedMSDeformAttn

    def __init__(self, layer: DeformableLayer, kind: type[PackedLinear] = PackedLinear) -> None:
        nn.Module.__init__(self)
        share_state(self, layer)
        self.self_attn = PackedMSDeformAttn(layer.self_attn, kind)
        self.fc1, self.activation, self.fc2 = kind(layer.fc1, "relu"), nn.Identity(), kind(layer.fc2)

    def forward(
        self,
        vision: Tensor,
        position_embedding: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        vision_mask: Tensor | None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what `DeformableLayer.forward` computes."""
        library = None if output_attentions else self.self_attn.library_for(vision)
        if library is None:
            return super().forward(
                vision, position_embedding, reference_points, spatial_shapes, vision_mask, output_attentions
            )
        vision = vision.contiguous()
        position_embedding, reference_points = (
            x.expand(len(vision), *x.shape[1:]) for x in (position_embedding, reference_points)
        )
        values, projected = self._project(vision, position_embedding, vision_mask)
        output = torch.empty_like(vision)
        weights = weights_for(vision, self.fc1, self.fc2, self.self_attn.output_proj)

        def block(image: int, rows: slice) -> None:
            here = slice(image, image + 1)
            sampled = self.self_attn.sample(
                library, projected[here, rows], values[here], reference_points[here, rows], spatial_shapes
            )
            features, result = vision[image, rows], output[image, rows]
            if weights is None:
                result.copy_(self._feed_forward(features, self.self_attn.output_proj(sampled[0])))
            else:
                finish_layer(features, sampled[0], weights, self.self_attn_layer_norm, self.final_layer_norm, result)

        run_rows(RowBlocks(block, vision.shape[0], vision.shape[1], rows_at_once(*vision.shape[1:])))
        return output, None

    def _project(self, vision: Tensor, positions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the values (B, S, D) and each token's offsets and logits (B, S, 3 * M * L * K)."""
        joint = self.self_attn.joint_projection()
        values, projected = torch.empty_like(vision), vision.new_empty(*vision.shape[:2], joint.out_features)
        write, write_values = joint.writer(vision), self.self_attn.value_block(vision, mask, values)

        def block(image: int, rows: slice) -> None:
            write_values(image, rows)
            write(projected[image, rows], vision[image, rows], positions[image, rows])

        run_rows(RowBlocks(block, vision.shape[0], vision.shape[1], rows_at_once(*vision.shape[1:])))
        return values, projected
