"""Box head and contrastive class head.

Similarity of a query q and a text token t, by config.class_head:

    dot          s = q . t                                     (Liu et al. 2023, arXiv:2303.05499)
    scaled_bias  s = q . t / sqrt(D) + b                       (Zhao et al. 2024, arXiv:2401.02361)
    cosine       s = (q . t) / (|q| |t|) / temperature + b     (Radford et al. 2021, arXiv:2103.00020)
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_gdino import GDinoConfig

# The bias at which an untrained head answers 0.01, so that the many negatives do not swamp the first steps
# (Lin et al. 2017, 3.3).
PRIOR_BIAS = -math.log((1 - 0.01) / 0.01)


class MLP(nn.Module):
    """Linear layers with ReLU between them: box regression and the query position embedding."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(widths[i], widths[i + 1]) for i in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """(..., input_dim) to (..., output_dim)."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class BoxHead(MLP):
    """Box deltas before the sigmoid: (..., D) to (..., 4)."""

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__(config.d_model, config.d_model, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., 4) float32: in half precision a delta of 2 is off by two thirds of a pixel in 320."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        last = self.layers[-1]
        weight = getattr(last, "weight", None)
        narrow = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype != torch.float32
        with torch.autocast(device_type=x.device.type, enabled=False):
            if narrow and type(last) is nn.Linear:
                bias = cast(Tensor, last.bias)
                return F.linear(x.float(), cast(Tensor, weight).float(), bias.float())
            # Adapters and quantized layers are called, never read; a narrow one is asked in its own dtype.
            return last(x.to(cast(Tensor, weight).dtype) if narrow else x.float()).float()


class ContrastiveHead(nn.Module):
    """Logits of each query for each text token; the equations stand at the top of this file."""

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__()
        self.kind = config.class_head
        self.max_text_len = config.max_text_len
        if self.kind != "dot":
            self.bias = nn.Parameter(torch.tensor(PRIOR_BIAS))
        if self.kind == "cosine":
            self.initial_log_temperature = math.log(config.class_head_temperature)
            self.log_temperature = nn.Parameter(torch.tensor(self.initial_log_temperature))

    def similarity(self, queries: Tensor, text: Tensor) -> Tensor:
        """Unmasked scores.

        Args:
            queries: (B, Q, D).
            text: (B, T, D).

        Returns:
            (B, Q, T).
        """
        if self.kind == "cosine":
            queries, text = F.normalize(queries, dim=-1), F.normalize(text, dim=-1)
        scores = queries @ text.transpose(-1, -2)
        if self.kind == "scaled_bias":
            return scores / math.sqrt(queries.shape[-1]) + self.bias
        if self.kind == "cosine":
            return scores * torch.exp(-self.log_temperature) + self.bias
        return scores

    def scores(self, queries: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Token logits as long as the prompts: arguments as in `forward`, (B, Q, T), -inf on padding."""
        return self.similarity(queries, text).masked_fill(~text_mask[:, None, :], -torch.inf)

    def pad(self, scores: Tensor) -> Tensor:
        """(..., T) to (..., max_text_len), -inf where no prompt reaches."""
        return F.pad(scores, (0, self.max_text_len - scores.shape[-1]), value=-torch.inf)

    def forward(self, queries: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Token logits padded to the longest prompt.

        Args:
            queries: (B, Q, D).
            text: (B, T, D).
            text_mask: (B, T) bool, True on real tokens.

        Returns:
            (B, Q, max_text_len), -inf outside the prompt.
        """
        return self.pad(self.scores(queries, text, text_mask))
