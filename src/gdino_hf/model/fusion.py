"""Image-text fusion, the first part of every encoder layer (Liu et al. 2023, 3.1; GLIP, Li et al. 2022, equation 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend
from .configuration_gdino import GDinoConfig

# Attention weights of image tokens over the text, (B, M, S, T), and of text tokens over the image, (B, M, T, S).
FusionWeights = tuple[Tensor, Tensor]


def drop_path(x: Tensor, probability: float, training: bool) -> Tensor:
    """Drop a residual branch for whole samples at random (stochastic depth, Huang et al. 2016).

    Args:
        x: (B, ...) output of the branch.
        probability: Probability in [0, 1) that a sample's branch is dropped.
        training: Whether the model trains; otherwise nothing is dropped.

    Returns:
        The branch, zero for dropped samples and scaled up for the others, so that its mean is unchanged.
    """
    if not training or probability == 0.0:
        return x
    keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - probability)
    return x * keep / (1 - probability)


def is_plain(layer: nn.Module) -> bool:
    """Return whether a layer is a linear layer that is nothing but a product with its weight.

    Adapters and quantized layers compute more than that product, and hooks (of accelerate's offloading, of pruning, or
    a user's own) only run if the layer is called.

    Args:
        layer: Any module.
    """
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return (
        type(layer) is nn.Linear
        and not any(hooks)
        and "forward" not in layer.__dict__
        and not hasattr(layer.weight, "__tensor_flatten__")
    )


class BiAttention(nn.Module):
    """Cross-attention in both directions from one set of scores.

    On image features v and text features t, with scores A = (v W_q)(t W_k)^T / sqrt(Dh):

        to_vision = softmax_text(A) (t W_vt) W_ov        to_text = softmax_image(A^T) (v W_vv) W_ot
    """

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
        self,
        vision: Tensor,
        text: Tensor,
        vision_mask: Tensor | None,
        text_mask: Tensor,
        output_attentions: bool = False,
        vision_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, FusionWeights | None]:
        """Attend from image to text and from text to image.

        Args:
            vision: (B, S, D) image features.
            text: (B, T, D) text features.
            vision_mask: (B, S) bool, True on real tokens, or None if all are real.
            text_mask: (B, T) bool, True on real tokens.
            output_attentions: Whether to return the attention weights, too.
            vision_scale: (B, 1, D) factors. If given, what the image tokens gather is multiplied by them and added to
                the image features.

        Returns:
            What each image token gathers from the text, (B, S, D), or that sum; what each text token gathers from the
            image, (B, T, D); and the weights of both or None.
        """
        projections = (self.vision_proj, self.values_vision_proj, self.out_vision_proj)
        if all(is_plain(projection) for projection in projections):
            return self._folded(vision, text, vision_mask, text_mask, output_attentions, vision_scale)
        query, key = self._split(self.vision_proj(vision)), self._split(self.text_proj(text))
        text_values, vision_values = self.values_text_proj(text), self.values_vision_proj(vision)
        vision_mask = None if vision_mask is None else vision_mask[:, None, None, :]
        options = (self.dropout, output_attentions)
        to_vision, over_text = attend(
            self, self.config, query, key, self._split(text_values), text_mask[:, None, None, :], *options
        )
        to_text, over_vision = attend(self, self.config, key, query, self._split(vision_values), vision_mask, *options)
        weights = None if over_text is None or over_vision is None else (over_text, over_vision)
        gathered = self.out_vision_proj(to_vision)
        result = gathered if vision_scale is None else vision + vision_scale * gathered
        return result, self.out_text_proj(to_text), weights

    def _folded(
        self,
        vision: Tensor,
        text: Tensor,
        vision_mask: Tensor | None,
        text_mask: Tensor,
        output_attentions: bool,
        vision_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor, FusionWeights | None]:
        """Compute the same attention without projecting image tokens to the inner width; see `fold`."""
        directions, offsets, brought = self.fold(text)
        # (B, M, T, S) rather than (B, M, S, T), so the sums of both softmaxes read memory in order.
        scores = (directions @ vision.transpose(1, 2) + offsets).unflatten(1, (self.num_heads, text.shape[1]))

        text_weights = scores.masked_fill(~text_mask[:, None, :, None], torch.finfo(scores.dtype).min).softmax(2)
        # (B, M, S, T), the tensor that is returned, so that gradients with respect to it can be asked for.
        text_weights = text_weights.transpose(2, 3)
        over_text = F.dropout(text_weights, self.dropout, self.training)
        over_text = over_text.transpose(2, 3).flatten(1, 2)
        if vision_scale is None:
            to_vision = over_text.transpose(1, 2) @ brought + self.out_vision_proj.bias
        else:
            # Scale and bias are applied to the few values of the text, so that the image features, which are many, are
            # read and written once. The bias is a further value, which every image token takes with weight one.
            ones = over_text.new_ones(len(vision), 1, vision.shape[1])
            brought = torch.cat((brought, self.out_vision_proj.bias.expand(len(vision), 1, -1)), dim=1) * vision_scale
            to_vision = torch.baddbmm(vision, torch.cat((over_text, ones), dim=1).transpose(1, 2), brought)

        if vision_mask is not None:
            scores = scores.masked_fill(~vision_mask[:, None, None, :], torch.finfo(scores.dtype).min)
        vision_weights = scores.softmax(3)
        over_vision = F.dropout(vision_weights, self.dropout, self.training)
        pooled = over_vision.flatten(1, 2) @ vision
        # The attention weights of a row sum to one unless dropout removed some.
        total = over_vision.sum(3, keepdim=True) if self.training and self.dropout > 0 else 1.0
        weights_of_both = (text_weights, vision_weights) if output_attentions else None
        return to_vision, self.unfold(pooled, total), weights_of_both

    def fold(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Move the projections of image tokens to the text's side.

        There are few text tokens, so each projection is moved to the text's side of its product: W_q to the scores'
        keys, q . k = v . (W_q k) + b_q . k; W_ov to the text's values; W_vv to what the text pools from the image. An
        image token then costs 3 * M * T * D multiplications instead of 3 * inner * (D + T), which is a fortieth for
        seven text tokens and no more than before up to 256 of them.

        Args:
            text: (B, T, D) text features.

        Returns:
            W_q k (B, M * T, D) and b_q . k (B, M * T, 1), with which the scores are (W_q k) . v + b_q . k; and the
            text's values times W_ov (B, M * T, D).
        """
        heads = self.num_heads
        key = self._split(self.text_proj(text)) * (self.vision_proj.out_features // heads) ** -0.5
        weight, bias = (x.unflatten(0, (heads, -1)) for x in (self.vision_proj.weight, self.vision_proj.bias))
        out_weight = self.out_vision_proj.weight.unflatten(1, (heads, -1)).permute(1, 2, 0)
        brought = self._split(self.values_text_proj(text)) @ out_weight
        return (key @ weight).flatten(1, 2), (key @ bias[:, :, None]).flatten(1, 2), brought.flatten(1, 2)

    def unfold(self, pooled: Tensor, total: Tensor | float = 1.0) -> Tensor:
        """Project what the text pools from the image.

        Args:
            pooled: (B, M * T, D) sums of image features, weighted by each head's attention.
            total: (B, M, T, 1) sums of those weights.

        Returns:
            (B, T, D) what each text token gathers from the image.
        """
        projection, heads = self.values_vision_proj, self.num_heads
        weight, bias = (x.unflatten(0, (heads, -1)) for x in (projection.weight, projection.bias))
        values = pooled.unflatten(1, (heads, -1)) @ weight.transpose(1, 2) + total * bias[:, None, :]
        return self.out_text_proj(values.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """Split heads: (B, N, inner) to (B, M, N, Dh)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class FusionLayer(nn.Module):
    """Exchange between image and text, of the kind that config.fusion_type names."""

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
        self,
        vision: Tensor,
        text: Tensor,
        vision_mask: Tensor | None,
        text_mask: Tensor,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor, FusionWeights | None]:
        """Fuse image and text features.

        With v and t normalized, and to_vision and to_text from `BiAttention`:

            bi_attention   v' = v + gamma_v * to_vision              t' = t + gamma_t * to_text
            gated          v' = g * v + (1 - g) * to_vision,  g = sigmoid(FFN([v; to_vision])),  and likewise for t

        Args:
            vision: (B, S, D) image features.
            text: (B, T, D) text features.
            vision_mask: (B, S) bool, True on real tokens, or None if all are real.
            text_mask: (B, T) bool, True on real tokens.
            output_attentions: Whether to return the attention weights, too.

        Returns:
            Image features (B, S, D), text features (B, T, D), and the attention weights or None.
        """
        # As in the published model, the residual is added to the normalized features, not to the input.
        vision, text = self.layer_norm_vision(vision), self.layer_norm_text(text)
        if self._adds_inside(vision):
            scale = drop_path(self.vision_param.expand(len(vision), 1, -1), self.drop_path, self.training)
            vision, to_text, weights = self.attn(vision, text, vision_mask, text_mask, output_attentions, scale)
            return vision, text + drop_path(self.text_param * to_text, self.drop_path, self.training), weights
        to_vision, to_text, weights = self.attn(vision, text, vision_mask, text_mask, output_attentions)
        if self.kind == "gated":
            return mix(self.gate_vision, vision, to_vision), mix(self.gate_text, text, to_text), weights
        if not self.training or self.drop_path == 0.0:
            vision = torch.addcmul(vision, self.vision_param, to_vision)
            text = torch.addcmul(text, self.text_param, to_text)
        else:
            vision = vision + drop_path(self.vision_param * to_vision, self.drop_path, self.training)
            text = text + drop_path(self.text_param * to_text, self.drop_path, self.training)
        return vision, text, weights

    def _adds_inside(self, vision: Tensor) -> bool:
        """Return whether the attention adds its result to the image features itself, as in training in float32.

        In half precision the scaled values would be rounded before they are summed.
        """
        return (
            self.kind == "bi_attention"
            and not torch.compiler.is_compiling()
            and torch.is_grad_enabled()
            and vision.dtype == torch.float32
            and not torch.is_autocast_enabled(vision.device.type)
        )


def _gate(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))


def mix(gate: nn.Module, own: Tensor, other: Tensor) -> Tensor:
    """Return g * own + (1 - g) * other, with g = sigmoid(gate([own; other])), for (..., D) features."""
    share = gate(torch.cat((own, other), dim=-1)).sigmoid()
    return share * own + (1 - share) * other
