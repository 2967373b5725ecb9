"""Multi-head attention through whichever implementation the model was told to use."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def attend(
    module: nn.Module,
    config: PreTrainedConfig,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v by the implementation in config._attn_implementation (SDPA unless told otherwise).

    Args:
        module: The calling module; its `training` flag turns dropout on.
        config: The model's configuration.
        query: (B, M, Q, Dh).
        key: (B, M, N, Dh).
        value: (B, M, N, Dv).
        mask: Broadcastable to (B, M, Q, N), bool, True = may attend, or None.
        dropout: Probability of dropping an attention weight in training.

    Returns:
        (B, Q, M * Dv).
    """
    implementation = config._attn_implementation
    if implementation in (None, "eager"):
        scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = nn.functional.dropout(scores.softmax(-1), dropout, module.training)
        output = (weights @ value).transpose(1, 2)
    else:
        function = ALL_ATTENTION_FUNCTIONS[implementation]
        output, _ = function(
            module,
            query,
            key,
            value,
            attention_mask=mask,
            dropout=dropout if module.training else 0.0,
            scaling=query.shape[-1] ** -0.5,
            is_causal=False,
        )
    return output.flatten(2)


class MultiheadAttention(nn.Module):
    """Scaled dot-product attention with separate projections (Vaswani et al. 2017, 3.2.2).

    Args:
        config: The model's configuration; gives the width, dropout and implementation.
        num_heads: Heads M; the width must be a multiple.
    """

    is_causal = False

    def __init__(self, config: PreTrainedConfig, num_heads: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.num_key_value_groups = 1
        self.dropout = config.attention_dropout
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key = nn.Linear(config.d_model, config.d_model)
        self.value = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            queries: (B, Q, D).
            keys: (B, N, D).
            values: (B, N, D).
            mask: Broadcastable to (B, 1, Q, N), bool, True = may attend.

        Returns:
            (B, Q, D).
        """
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, x in ((self.query, queries), (self.key, keys), (self.value, values))
        )
        return self.out_proj(attend(self, self.config, query, key, value, mask, self.dropout))
