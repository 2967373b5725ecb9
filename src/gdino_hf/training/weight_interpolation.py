"""Against forgetting: finished weights on the way from the start to where fine-tuning led."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def starting_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's parameters before they are trained.

    Args:
        model: The model, without adapters.

    Returns:
        By name, on the CPU.
    """
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def blend(model: nn.Module, start: dict[str, Tensor], share: float) -> None:
    """Move trained weights back towards their start, which costs little of the new and keeps much of the old.

    weights = share * start + (1 - share) * trained, as in Wortsman et al. 2022 (arXiv:2109.01903, equation 2).

    Args:
        model: The trained model, without adapters.
        start: From `starting_weights`.
        share: Of the start, 0..1.

    Raises:
        ValueError: The share is out of range, or the weights are of another model.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"The share of the starting weights must be within 0..1, got {share}.")
    trained = dict(model.named_parameters())
    if trained.keys() != start.keys():
        odd = min(trained.keys() ^ start.keys())
        raise ValueError(f"The starting weights are of another model: {odd} stands in one of them only.")
    for name, parameter in trained.items():
        parameter.lerp_(start[name].to(parameter.device, parameter.dtype), share)
