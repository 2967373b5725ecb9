"""The deformable encoder layer with 8-bit products, which passes over the image tokens three times instead of nine."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..model.encoder import DeformableLayer
from .int8_linear import Int8Linear, weights_for
from .packed_attention import PackedMSDeformAttn
from .packed_linear import share_state


class Int8DeformableLayer(DeformableLayer):
    """A DeformableLayer that shares another one's parameters and multiplies 8-bit integers in its linear layers.

    Args:
        layer: The layer to replace, whose activation is ReLU; its parameters are shared.
    """

    self_attn: PackedMSDeformAttn

    def __init__(self, layer: DeformableLayer) -> None:
        nn.Module.__init__(self)
        share_state(self, layer)
        self.self_attn = PackedMSDeformAttn(layer.self_attn, int8=True)
        self.fc1, self.activation, self.fc2 = Int8Linear(layer.fc1, "relu"), nn.Identity(), Int8Linear(layer.fc2)

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
        attention = self.self_attn
        library = None if output_attentions else attention.library_for(vision)
        weights = weights_for(vision, self.fc1, self.fc2, attention.output_proj)
        if library is None or weights is None:
            return super().forward(
                vision, position_embedding, reference_points, spatial_shapes, vision_mask, output_attentions
            )
        first, second, project = weights
        projected = attention.joint_projection()(vision, position_embedding)
        sampled = attention.sample(library, projected, vision, reference_points, spatial_shapes, vision_mask)
        enhanced = first.library.feed_forward(
            vision,
            first,
            second,
            "relu",
            branch=(sampled, project),
            before=self.self_attn_layer_norm,
            after=self.final_layer_norm,
        )
        return enhanced, None
