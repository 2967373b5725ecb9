"""Multi-head attention by the implementation that `attn_implementation` selects."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .transformers_internals import attention_function


def attend(
    module: nn.Module,
    config: PreTrainedConfig,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute softmax(q k^T / sqrt(Dh)) v by the selected implementation (SDPA by default).

    Args:
        module: The calling module; dropout is applied while it is in training mode.
        config: The model's configuration, which holds the choice of implementation.
        query: (B, M, Q, Dh) queries.
        key: (B, M, N, Dh) keys.
        value: (B, M, N, Dv) values.
        mask: Bool mask that broadcasts to (B, M, Q, N), True = may attend. None lets all pairs attend.
        dropout: Probability in [0, 1] of dropping an attention weight during training.
        output_attentions: Whether to return the attention weights, too. They are then computed by the equation above,
            whatever the selected implementation, since SDPA does not return them.

    Returns:
        (B, Q, M * Dv) attended values, heads side by side, and the (B, M, Q, N) attention weights before dropout, or
        None unless asked for.
    """
    function = None if output_attentions else attention_function(config)
    if function is None:
        scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        output = (nn.functional.dropout(weights, dropout, module.training) @ value).transpose(1, 2)
        return output.flatten(2), weights if output_attentions else None
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
    return output.flatten(2), None


class MultiheadAttention(nn.Module):
    """Multi-head attention with separate projections of queries, keys and values (Vaswani et al. 2017, 3.2.2).

    Args:
        config: The model's configuration, which sets the width D, the dropout and the attention implementation.
        num_heads: Number of heads M; D must be a multiple of it.
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

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Let each query attend to the keys.

        Args:
            queries: (B, Q, D) features that ask.
            keys: (B, N, D) features that are compared with the queries.
            values: (B, N, D) features that are averaged.
            mask: Bool mask that broadcasts to (B, 1, Q, N), True = may attend. None lets all pairs attend.
            output_attentions: Whether to return the attention weights, too.

        Returns:
            (B, Q, D) attended features, and the (B, M, Q, N) attention weights or None.
        """
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, x in ((self.query, queries), (self.key, keys), (self.value, values))
        )
        attended, weights = attend(self, self.config, query, key, value, mask, self.dropout, output_attentions)
        return self.out_proj(attended), weights
