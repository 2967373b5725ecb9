"""Weight interpolation between the initial and the fine-tuned model, which limits forgetting.

Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv:2109.01903.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def initial_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy a model's parameters before it is trained.

    Args:
        model: The model, without adapters.

    Returns:
        The parameters by name, on the CPU.
    """
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def interpolate_weights(model: nn.Module, initial: dict[str, Tensor], share: float) -> None:
    """Move trained weights back towards the initial ones, which trades a little new accuracy for much of the old.

    weights = share * initial + (1 - share) * trained (equation 2 of the paper).

    Args:
        model: The trained model, without adapters; it is changed in place.
        initial: Weights from `initial_weights`.
        share: Share of the initial weights, in [0, 1].

    Raises:
        ValueError: The share is out of range, or the weights belong to another model.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"The share of the initial weights must be in [0, 1], got {share}.")
    trained = dict(model.named_parameters())
    if trained.keys() != initial.keys():
        odd = min(trained.keys() ^ initial.keys())
        raise ValueError(f"The initial weights belong to another model: only one of the two has {odd}.")
    for name, parameter in trained.items():
        parameter.lerp_(initial[name].to(parameter.device, parameter.dtype), share)
