"""The feature enhancer: fusion, text self-attention and deformable image self-attention (Liu et al. 2023, 3.1)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import MultiheadAttention
from .configuration_gdino import GDinoConfig
from .fusion import FusionLayer
from .ms_deform_attn import MSDeformAttn
from .position_encoding import grid_centers
from .token_blocks import by_blocks


class TextEnhancerLayer(nn.Module):
    """Self-attention within phrases, then a feed-forward block; normalization after each."""

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

    def forward(self, text: Tensor, position_embedding: Tensor, phrase_mask: Tensor) -> Tensor:
        """Enhance.

        Args:
            text: (B, T, D).
            position_embedding: (B, T, D), added to queries and keys.
            phrase_mask: (B, T, T) bool, True = may attend.

        Returns:
            (B, T, D).
        """
        queries = text + position_embedding
        attended = self.self_attn(queries, queries, text, phrase_mask[:, None])
        text = self.layer_norm_before(text + F.dropout(attended, self.dropout, self.training))
        inner = F.dropout(self.activation(self.fc1(text)), self.dropout, self.training)
        return self.layer_norm_after(text + F.dropout(self.fc2(inner), self.dropout, self.training))


class DeformableLayer(nn.Module):
    """Deformable self-attention over all levels, then a feed-forward block; normalization after each."""

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

    def forward(
        self,
        vision: Tensor,
        position_embedding: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        vision_mask: Tensor | None,
    ) -> Tensor:
        """Enhance: (B, S, D) to the same; other arguments as in `MSDeformAttn.forward`."""
        attended = self.self_attn(vision + position_embedding, vision, reference_points, spatial_shapes, vision_mask)
        return by_blocks(self._feed_forward, vision, attended)

    def _feed_forward(self, vision: Tensor, attended: Tensor) -> Tensor:
        vision = self.self_attn_layer_norm(vision + F.dropout(attended, self.dropout, self.training))
        inner = F.dropout(self.activation(self.fc1(vision)), self.activation_dropout, self.training)
        return self.final_layer_norm(vision + F.dropout(self.fc2(inner), self.dropout, self.training))


class EncoderLayer(GradientCheckpointingLayer):
    """Fusion, then text enhancer, then deformable self-attention."""

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
    ) -> tuple[Tensor, Tensor]:
        """One round of enhancement; arguments as in `Encoder.forward`."""
        vision, text = self.fusion_layer(vision, text, vision_mask, text_mask)
        text = self.text_enhancer_layer(text, text_position_embedding, phrase_mask)
        vision = self.deformable_layer(vision, vision_position_embedding, reference_points, spatial_shapes, vision_mask)
        return vision, text


class Encoder(nn.Module):
    """All encoder layers."""

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
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Enhance image and text features by each other.

        Args:
            vision: (B, S, D).
            text: (B, T, D).
            vision_position_embedding: (B or 1, S, D).
            text_position_embedding: (B, T, D).
            reference_points: (B or 1, S, L, 2) float32, where each image token stands; see `grid_reference_points`.
            spatial_shapes: (h, w) of each level.
            vision_mask: (B, S) bool, True on real tokens, or None if all are.
            text_mask: (B, T) bool, True on real tokens.
            phrase_mask: (B, T, T) bool, True = may attend.

        Returns:
            Vision (B, S, D), text (B, T, D), and both before every layer.
        """
        vision_states, text_states = [], []
        for layer in self.layers:
            vision_states.append(vision)
            text_states.append(text)
            vision, text = layer(
                vision,
                text,
                vision_position_embedding,
                text_position_embedding,
                reference_points,
                spatial_shapes,
                vision_mask,
                text_mask,
                phrase_mask,
            )
        return vision, text, vision_states, text_states


def grid_reference_points(spatial_shapes: Sequence[tuple[int, int]], valid_ratios: Tensor) -> Tensor:
    """Where each image token stands on every level.

    Args:
        spatial_shapes: (h, w) of each level.
        valid_ratios: (B, L, 2) float32 xy.

    Returns:
        (B, S, L, 2) float32 xy in [0, 1] of the padded map.
    """
    points = []
    for level, (height, width) in enumerate(spatial_shapes):
        centers = grid_centers(height, width, valid_ratios.device)
        sides = torch.stack((valid_ratios[:, level, 0] * width, valid_ratios[:, level, 1] * height), dim=-1)
        points.append(centers[None] / sides[:, None])
    return torch.cat(points, dim=1)[:, :, None] * valid_ratios[:, None]
