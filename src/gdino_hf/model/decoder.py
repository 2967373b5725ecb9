"""The cross-modality decoder with box refinement (Liu et al. 2023, 3.3; look forward twice: Zhang et al. 2022, 3.5)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import MultiheadAttention
from .box_ops import inverse_sigmoid
from .configuration_gdino import GDinoConfig
from .heads import MLP
from .ms_deform_attn import MSDeformAttn
from .position_encoding import box_position_embedding

# A function of a decoder layer's index and its (B, Q, D) query features that returns (B, Q, 4) box deltas.
BoxDeltas = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class DecoderStates:
    """What the decoder hands to the heads.

    Attributes:
        last_hidden_state: (B, Q, D) normalized output of the last layer.
        hidden_states: (B, Q, D) normalized output of each layer.
        input_references: (B, Q, 4) float32 cxcywh boxes that each layer started from. Layers after the first start
            from the boxes that the layer before refined. Those boxes keep their gradient, so the loss of a layer also
            trains the box head of the layer before (look forward twice).
        output_references: (B, Q, 4) float32 cxcywh boxes that each layer refined, without gradient.
        first_hidden_state: (B, Q, D) normalized input of the first layer; None unless asked for.
        attentions: Attention weights by kind and layer, see `Decoder.forward`; None unless asked for.
    """

    last_hidden_state: Tensor
    hidden_states: list[Tensor]
    input_references: list[Tensor]
    output_references: list[Tensor]
    first_hidden_state: Tensor | None
    attentions: tuple[tuple[Tensor, ...], ...] | None


class DecoderLayer(GradientCheckpointingLayer):
    """Self-attention, text cross-attention, deformable image cross-attention, feed-forward block, each normalized."""

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__()
        width, heads = config.d_model, config.decoder_attention_heads
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
        self.activation = ACT2FN[config.activation_function]
        self.self_attn = MultiheadAttention(config, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.encoder_attn_text = MultiheadAttention(config, heads)
        self.encoder_attn_text_layer_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.encoder_attn = MSDeformAttn(width, config.num_feature_levels, heads, config.decoder_n_points)
        self.encoder_attn_layer_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.decoder_ffn_dim)
        self.fc2 = nn.Linear(config.decoder_ffn_dim, width)
        self.final_layer_norm = nn.LayerNorm(width, config.layer_norm_eps)
        # A faster way to train the feed-forward block, which gdino_hf.training sets: a function of this layer and its
        # queries that returns what the second linear layer returns, or None where it does not apply.
        self.fast_step: Callable[..., Tensor | None] | None = None

    def forward(
        self,
        queries: Tensor,
        position_embedding: Tensor,
        reference_points: Tensor,
        vision: Tensor,
        text: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        vision_mask: Tensor | None,
        text_mask: Tensor,
        query_mask: Tensor | None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Apply the layer.

        Args:
            queries: (B, Q, D) query features.
            position_embedding: (B, Q, D) embedding of the queries' boxes, added to the queries before each attention.
            reference_points: (B, Q, L, 4) float32 cxcywh boxes relative to each level's padded map.
            vision: (B, S, D) image features.
            text: (B, T, D) text features.
            spatial_shapes: (h, w) of each level.
            vision_mask: (B, S) bool, True on real tokens, or None if all are real.
            text_mask: (B, T) bool, True on real tokens.
            query_mask: Bool mask that broadcasts to (B, 1, Q, Q), True = may attend. None lets all pairs attend.
            output_attentions: Whether to return the attention weights, too.

        Returns:
            (B, Q, D) query features, and the attention weights of the three attentions or None; see `Decoder.forward`.
        """
        placed = queries + position_embedding
        attended, own = self.self_attn(placed, placed, queries, query_mask, output_attentions)
        queries = self.self_attn_layer_norm(queries + self._drop(attended))
        attended, over_text = self.encoder_attn_text(
            queries + position_embedding, text, text, text_mask[:, None, None, :], output_attentions
        )
        queries = self.encoder_attn_text_layer_norm(queries + self._drop(attended))
        attended, over_points = self.encoder_attn(
            queries + position_embedding, vision, reference_points, spatial_shapes, vision_mask, output_attentions
        )
        queries = self.encoder_attn_layer_norm(queries + self._drop(attended))
        queries = self.final_layer_norm(queries + self._drop(self._feed_forward(queries)))
        return queries, (own, over_text, over_points) if output_attentions else None

    def _feed_forward(self, queries: Tensor) -> Tensor:
        if self.fast_step is not None and not torch.compiler.is_compiling():
            fast = self.fast_step(self, queries)
            if fast is not None:
                return fast
        return self.fc2(F.dropout(self.activation(self.fc1(queries)), self.activation_dropout, self.training))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Decoder(nn.Module):
    """The stack of decoder layers, each of which refines the boxes of the one before."""

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__()
        self.config = config
        width = config.d_model
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.layer_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.reference_points_head = MLP(width // 2 * 4, width, width, 2)

    def forward(
        self,
        queries: Tensor,
        references: Tensor,
        vision: Tensor,
        text: Tensor,
        valid_ratios: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        vision_mask: Tensor | None,
        text_mask: Tensor,
        query_mask: Tensor | None = None,
        box_deltas: BoxDeltas | None = None,
        scale_positions: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> DecoderStates:
        """Turn queries into object features and refine their boxes layer by layer.

        Layer i moves the boxes b by its box head's deltas: b_i = sigmoid( inverse_sigmoid(b_{i-1}) + box_head_i(q_i) ).

        Args:
            queries: (B, Q, D) query features.
            references: (B, Q, 4) float32 cxcywh in [0, 1], the boxes that the queries start from.
            vision: (B, S, D) image features.
            text: (B, T, D) text features.
            valid_ratios: (B or 1, L, 2) float32 share of each level that is not padding.
            spatial_shapes: (h, w) of each level.
            vision_mask: (B, S) bool, True on real tokens, or None if all are real.
            text_mask: (B, T) bool, True on real tokens.
            query_mask: Bool mask that broadcasts to (B, 1, Q, Q), True = may attend. None lets all pairs attend.
            box_deltas: Function of a layer's index and its query features that returns the deltas of its box head,
                (B, Q, 4) before the sigmoid. None leaves the boxes unchanged.
            scale_positions: Whether the queries' position embedding is relative to the padded map, as in the
                published models, or else to the image itself.
            output_attentions: Whether to return the attention weights, too.
            output_hidden_states: Whether to return the normalized input of the first layer, too.

        Returns:
            The states of every layer. The attention weights are three tuples with an entry per layer: queries over each
            other (B, M, Q, Q), over the text (B, M, Q, T), and over their sampled points (B, Q, M, L, K).
        """
        ratios = torch.cat((valid_ratios, valid_ratios), dim=-1)[:, None]
        first = self.layer_norm(queries) if output_hidden_states else None
        hidden_states, input_references, output_references, attentions = [], [], [], []
        reference_for_loss = references
        for index, layer in enumerate(self.layers):
            level_references = references[:, :, None] * ratios
            embedding = box_position_embedding(
                level_references[:, :, 0] if scale_positions else references,
                self.config.d_model // 2,
                self.config.query_position_temperature,
            )
            position_embedding = self.reference_points_head(embedding.to(queries.dtype))
            queries, weights = layer(
                queries,
                position_embedding,
                level_references,
                vision,
                text,
                spatial_shapes,
                vision_mask,
                text_mask,
                query_mask,
                output_attentions,
            )
            attentions.append(weights)
            input_references.append(reference_for_loss)
            if box_deltas is not None:
                eps = self.config.decoder_inverse_sigmoid_eps or self.config.inverse_sigmoid_eps
                # Refinement reads the features before the final normalization; the outputs read them after it.
                deltas = box_deltas(index, queries).to(references.device, torch.float32)
                refined = (deltas + inverse_sigmoid(references, eps)).sigmoid()
                reference_for_loss, references = refined, refined.detach()
            # The layers may be spread over several devices.
            hidden_states.append(self.layer_norm(queries).to(references.device))
            output_references.append(references)
        by_kind = tuple(zip(*attentions, strict=True)) if output_attentions else None
        return DecoderStates(hidden_states[-1], hidden_states, input_references, output_references, first, by_kind)
