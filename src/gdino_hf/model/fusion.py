"""Image-text fusion, at the start of every encoder layer (Liu et al. 2023, 3.1; GLIP, Li et al. 2022, equation 4).

bi_attention, on normalized features v (image) and t (text), A = (v W_q)(t W_k)^T / sqrt(Dh) shared by both ways:

    v' = v + gamma_v * softmax_text(A) (t W_vt) W_ov        t' = t + gamma_t * softmax_image(A^T) (v W_vv) W_ot

gated, with the other side brought to each token by the same two attentions, as a_v = softmax_text(A) (t W_vt) W_ov:

    v' = g * v + (1 - g) * a_v,   g = sigmoid(FFN([v; a_v]))        and its mirror image for t
"""

import torch
from torch import Tensor, nn

from .attention import attend
from .configuration_gdino import GDinoConfig


def drop_path(x: Tensor, probability: float, training: bool) -> Tensor:
    """Leave a residual branch out for whole samples at random (Huang et al. 2016)."""
    if not training or probability == 0.0:
        return x
    keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - probability)
    return x * keep / (1 - probability)


class BiAttention(nn.Module):
    """Cross-attention both ways from one set of scores."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.encoder_attention_heads // 2
        self.dropout = config.fusion_dropout
        width, inner = config.d_model, config.encoder_ffn_dim // 2
        self.vision_proj = nn.Linear(width, inner)
        self.text_proj = nn.Linear(width, inner)
        self.values_vision_proj = nn.Linear(width, inner)
        self.values_text_proj = nn.Linear(width, inner)
        self.out_vision_proj = nn.Linear(inner, width)
        self.out_text_proj = nn.Linear(inner, width)

    def forward(
        self, vision: Tensor, text: Tensor, vision_mask: Tensor | None, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What each side has to tell the other.

        Args:
            vision: (B, S, D).
            text: (B, T, D).
            vision_mask: (B, S) bool, True on real tokens, or None if all are.
            text_mask: (B, T) bool, True on real tokens.

        Returns:
            (B, S, D) text brought to the image, and (B, T, D) image brought to the text.
        """

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        query, key = split(self.vision_proj(vision)), split(self.text_proj(text))
        to_vision = attend(
            self,
            self.config,
            query,
            key,
            split(self.values_text_proj(text)),
            text_mask[:, None, None, :],
            self.dropout,
        )
        to_text = attend(
            self,
            self.config,
            key,
            query,
            split(self.values_vision_proj(vision)),
            None if vision_mask is None else vision_mask[:, None, None, :],
            self.dropout,
        )
        return self.out_vision_proj(to_vision), self.out_text_proj(to_text)


class FusionLayer(nn.Module):
    """Exchange between image and text by config.fusion_type; the equations stand at the top of this file."""

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__()
        self.kind = config.fusion_type
        self.drop_path = config.fusion_droppath
        self.initial_scale = config.fusion_init_value
        width = config.d_model
        self.layer_norm_vision = nn.LayerNorm(width, config.layer_norm_eps)
        self.layer_norm_text = nn.LayerNorm(width, config.layer_norm_eps)
        self.attn = BiAttention(config)
        if self.kind == "bi_attention":
            self.vision_param = nn.Parameter(torch.full((width,), self.initial_scale))
            self.text_param = nn.Parameter(torch.full((width,), self.initial_scale))
        else:
            self.gate_vision = _gate(width)
            self.gate_text = _gate(width)

    def forward(
        self, vision: Tensor, text: Tensor, vision_mask: Tensor | None, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fuse.

        Args:
            vision: (B, S, D).
            text: (B, T, D).
            vision_mask: (B, S) bool, True on real tokens, or None if all are.
            text_mask: (B, T) bool, True on real tokens.

        Returns:
            (B, S, D) and (B, T, D).
        """
        # The residual stands on the normalized features, as in the published model.
        vision, text = self.layer_norm_vision(vision), self.layer_norm_text(text)
        to_vision, to_text = self.attn(vision, text, vision_mask, text_mask)
        if self.kind == "gated":
            return _mix(self.gate_vision, vision, to_vision), _mix(self.gate_text, text, to_text)
        vision = vision + drop_path(self.vision_param * to_vision, self.drop_path, self.training)
        text = text + drop_path(self.text_param * to_text, self.drop_path, self.training)
        return vision, text


def _gate(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))


def _mix(gate: nn.Module, own: Tensor, other: Tensor) -> Tensor:
    share = gate(torch.cat((own, other), dim=-1)).sigmoid()
    return share * own + (1 - share) * other
