"""The box head and the contrastive class head, which turn query features into boxes and token scores."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_gdino import GDinoConfig

# With this bias an untrained head gives a probability of 0.01, so the many negatives do not dominate the first training
# steps (Lin et al. 2017, 3.3).
PRIOR_BIAS = -math.log((1 - 0.01) / 0.01)


class MLP(nn.Module):
    """Linear layers with ReLU between them, for box regression and the query position embedding.

    Args:
        input_dim: Width of the input.
        hidden_dim: Width between the layers.
        output_dim: Width of the output.
        num_layers: Number of linear layers, at least 1.
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(widths[i], widths[i + 1]) for i in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers: (..., input_dim) to (..., output_dim)."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever the dtype of its parameters and also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., N) float32."""
        with torch.autocast(device_type=x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class BoxHead(MLP):
    """Predicts how far each coordinate of a query's box moves, before the sigmoid."""

    def __init__(self, config: GDinoConfig) -> None:
        super().__init__(config.d_model, config.d_model, 4, 3)
        # In bfloat16, a delta of 2 would be off by up to two thirds of a pixel in an image 320 wide.
        self.layers[-1] = Float32Linear(config.d_model, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Predict box deltas: (..., D) to (..., 4) float32."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        last = self.layers[-1]
        if isinstance(last, Float32Linear):
            return last(x)
        # An adapter or a quantized layer has replaced it and computes in its own dtype.
        weight = getattr(last, "weight", None)
        floating = isinstance(weight, Tensor) and weight.is_floating_point()
        with torch.autocast(device_type=x.device.type, enabled=False):
            return last(x.to(cast(Tensor, weight).dtype) if floating else x.float()).float()


class ContrastiveHead(nn.Module):
    """Similarity of each query to each text token, of the kind that config.class_head names."""

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
        """Compute the similarity s of every query q to every text token t, without masking.

        dot          s = q . t                                     (Liu et al. 2023, arXiv:2303.05499, 3.4)
        scaled_bias  s = q . t / sqrt(D) + b                       (Zhao et al. 2024, arXiv:2401.02361)
        cosine       s = (q . t) / (|q| |t|) / temperature + b     (Radford et al. 2021, arXiv:2103.00020)

        Args:
            queries: (B, Q, D) query features.
            text: (B, T, D) text features.

        Returns:
            (B, Q, T) logits.
        """
        if self.kind == "cosine":
            queries, text = F.normalize(queries, dim=-1), F.normalize(text, dim=-1)
        scores = queries @ text.transpose(-1, -2)
        if self.kind == "scaled_bias":
            return scores / math.sqrt(queries.shape[-1]) + self.bias
        if self.kind == "cosine":
            return scores * torch.exp(-self.log_temperature) + self.bias
        return scores

    def forward(self, queries: Tensor, text: Tensor, text_mask: Tensor, padded: bool = True) -> Tensor:
        """Compute token logits, by default padded to the longest prompt that the model accepts.

        Args:
            queries: (B, Q, D) query features.
            text: (B, T, D) text features.
            text_mask: (B, T) bool, True on real tokens.
            padded: Whether to pad to max_text_len tokens.

        Returns:
            (B, Q, max_text_len) logits, or (B, Q, T) if not padded; -inf outside the prompt.
        """
        scores = self.similarity(queries, text).masked_fill(~text_mask[:, None, :], -torch.inf)
        return pad_logits(scores, self.max_text_len) if padded else scores


def pad_logits(logits: Tensor, max_text_len: int) -> Tensor:
    """Pad token logits (..., T) to (..., max_text_len) with -inf."""
    return F.pad(logits, (0, max_text_len - logits.shape[-1]), value=-torch.inf)
