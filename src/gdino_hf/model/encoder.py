"""The feature enhancer: fusion, text self-attention and deformable image self-attention (Liu et al. 2023, 3.1)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import MultiheadAttention
from .configuration_gdino import GDinoConfig
from .fusion import FusionLayer
from .image_geometry import ImageGeometry, Shapes
from .ms_deform_attn import MSDeformAttn
from .token_blocks import by_blocks


@dataclass(frozen=True)
class Memory:
    """What the encoder hands to query selection and to the decoder.

    Attributes:
        vision: (B, S, D) enhanced image features, all levels one after the other.
        text: (B, T, D) enhanced text features.
        vision_states: Image features before each layer and after the last, (B, S, D) each.
        text_states: Text features before each layer and after the last, (B, T, D) each.
        attentions: Attention weights by kind and layer, see `Encoder.forward`; None unless asked for.
        spatial_shapes: (h, w) of each level.
        geometry: Positions, reference points and proposals of the image tokens.
        vision_mask: (B, S) bool, True on real tokens, or None if all are real.
        text_mask: (B, T) bool, True on real tokens.
        padding_seen: Whether padding took part in the image features, as it does in published models.
    """

    vision: Tensor
    text: Tensor
    vision_states: tuple[Tensor, ...]
    text_states: tuple[Tensor, ...]
    attentions: tuple[tuple[Tensor, ...], ...] | None
    spatial_shapes: Shapes
    geometry: ImageGeometry
    vision_mask: Tensor | None
    text_mask: Tensor
    padding_seen: bool


class TextEnhancerLayer(nn.Module):
    """Self-attention within each phrase, then a feed-forward block, each followed by layer normalization."""

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__()
        width, inner = config.d_model, config.encoder_ffn_dim // 2
        self.dropout = config.text_enhancer_dropout
        self.activation = ACT2FN[config.activation_function]
        self.self_attn = MultiheadAttention(config, config.encoder_attention_heads // 2)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.layer_norm_before = nn.LayerNorm(width, config.layer_norm_eps)
        self.layer_norm_after = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(
        self, text: Tensor, position_embedding: Tensor, phrase_mask: Tensor, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Let the tokens of each phrase attend to each other.

        Args:
            text: (B, T, D) text features.
            position_embedding: (B, T, D) position embedding, added to queries and keys.
            phrase_mask: (B, T, T) bool, True = may attend.
            output_attentions: Whether to return the attention weights, too.

        Returns:
            (B, T, D) text features, and the (B, M, T, T) attention weights or None.
        """
        queries = text + position_embedding
        attended, weights = self.self_attn(queries, queries, text, phrase_mask[:, None], output_attentions)
        text = self.layer_norm_before(text + F.dropout(attended, self.dropout, self.training))
        inner = F.dropout(self.activation(self.fc1(text)), self.dropout, self.training)
        return self.layer_norm_after(text + F.dropout(self.fc2(inner), self.dropout, self.training)), weights


class DeformableLayer(nn.Module):
    """Deformable self-attention over all levels, then a feed-forward block, each followed by layer normalization."""

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__()
        width = config.d_model
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
        self.activation = ACT2FN[config.activation_function]
        self.self_attn = MSDeformAttn(
            width, config.num_feature_levels, config.encoder_attention_heads, config.encoder_n_points
        )
        self.self_attn_layer_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, width)
        self.final_layer_norm = nn.LayerNorm(width, config.layer_norm_eps)
        # A faster way to train, which gdino_hf.training sets: a function of this layer and of the tensors of `forward`
        # that returns its image features, or None where it does not apply.
        self.fast_step: Callable[..., Tensor | None] | None = None

    def forward(
        self,
        vision: Tensor,
        position_embedding: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        vision_mask: Tensor | None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Let each image token attend to a few sampled points of every level.

        Args:
            vision: (B, S, D) image features.
            position_embedding: (B or 1, S, D) position embedding, added to queries.
            reference_points: (B or 1, S, L, 2) float32 position of each image token on every level.
            spatial_shapes: (h, w) of each level.
            vision_mask: (B, S) bool, True on real tokens, or None if all are real.
            output_attentions: Whether to return the attention weights, too.

        Returns:
            (B, S, D) image features, and the (B, S, M, L, K) attention weights or None.
        """
        if self.fast_step is not None and not output_attentions and not torch.compiler.is_compiling():
            fast = self.fast_step(self, vision, position_embedding, reference_points, spatial_shapes, vision_mask)
            if fast is not None:
                return fast, None
        attended, weights = self.self_attn(
            vision + position_embedding, vision, reference_points, spatial_shapes, vision_mask, output_attentions
        )
        return by_blocks(self._feed_forward, vision, attended), weights

    def _feed_forward(self, vision: Tensor, attended: Tensor) -> Tensor:
        vision = self.self_attn_layer_norm(vision + F.dropout(attended, self.dropout, self.training))
        inner = F.dropout(self.activation(self.fc1(vision)), self.activation_dropout, self.training)
        return self.final_layer_norm(vision + F.dropout(self.fc2(inner), self.dropout, self.training))


class EncoderLayer(GradientCheckpointingLayer):
    """One encoder layer: fusion, then the text enhancer, then deformable self-attention of the image."""

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__()
        self.text_enhancer_layer = TextEnhancerLayer(config)
        self.fusion_layer = FusionLayer(config)
        self.deformable_layer = DeformableLayer(config)

    def forward(
        self,
        vision: Tensor,
        text: Tensor,
        vision_position_embedding: Tensor,
        text_position_embedding: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        vision_mask: Tensor | None,
        text_mask: Tensor,
        phrase_mask: Tensor,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None]:
        """Apply the layer; see `Encoder.forward` for the arguments and for the attention weights of one layer."""
        vision, text, fused = self.fusion_layer(vision, text, vision_mask, text_mask, output_attentions)
        text, enhanced = self.text_enhancer_layer(text, text_position_embedding, phrase_mask, output_attentions)
        vision, deformable = self.deformable_layer(
            vision, vision_position_embedding, reference_points, spatial_shapes, vision_mask, output_attentions
        )
        return vision, text, (*fused, enhanced, deformable) if output_attentions else None


class Encoder(nn.Module):
    """The stack of encoder layers."""

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(
        self,
        vision: Tensor,
        text: Tensor,
        vision_position_embedding: Tensor,
        text_position_embedding: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        vision_mask: Tensor | None,
        text_mask: Tensor,
        phrase_mask: Tensor,
        output_attentions: bool = False,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[tuple[Tensor, ...], ...] | None]:
        """Let image and text features attend to each other, layer by layer.

        Args:
            vision: (B, S, D) image features, all levels one after the other.
            text: (B, T, D) text features.
            vision_position_embedding: (B or 1, S, D) position embedding of the image tokens.
            text_position_embedding: (B, T, D) position embedding of the text tokens.
            reference_points: (B or 1, S, L, 2) float32 position of each image token on every level, see
                `grid_reference_points`.
            spatial_shapes: (h, w) of each level.
            vision_mask: (B, S) bool, True on real tokens, or None if all are real.
            text_mask: (B, T) bool, True on real tokens.
            phrase_mask: (B, T, T) bool, True = may attend.
            output_attentions: Whether to return the attention weights, too.

        Returns:
            Image features (B, S, D) before every layer and after the last, text features (B, T, D) likewise, and the
            attention weights of all layers or None. The weights are four tuples with an entry per layer: image tokens
            over the text (B, M, S, T), text tokens over the image (B, M, T, S), text tokens over their phrase
            (B, M, T, T), and image tokens over their sampled points (B, S, M, L, K).
        """
        vision_states, text_states, attentions = [vision], [text], []
        for layer in self.layers:
            vision, text, weights = layer(
                vision,
                text,
                vision_position_embedding,
                text_position_embedding,
                reference_points,
                spatial_shapes,
                vision_mask,
                text_mask,
                phrase_mask,
                output_attentions,
            )
            vision_states.append(vision)
            text_states.append(text)
            attentions.append(weights)
        by_kind = tuple(zip(*attentions, strict=True)) if output_attentions else None
        return tuple(vision_states), tuple(text_states), by_kind
