"""Random models whose outputs depend on their inputs, for tests that compare outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from gdino_hf import GDinoConfig, GDinoForObjectDetection


def make_random_model(
    config: GDinoConfig, seed: int = 0, perturb: Callable[[str], bool] = lambda name: "backbone" not in name
) -> GDinoForObjectDetection:
    """Return a model in eval mode whose scores and boxes depend on image and text.

    A freshly initialized model would not do: its box heads and sampling offsets ignore the input.

    Args:
        config: Configuration of the model, which is not changed.
        seed: Seed for the weights.
        perturb: Function that selects, by name, the parameters to add noise to; by default those outside the backbones.
    """
    torch.manual_seed(seed)
    model = GDinoForObjectDetection(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if perturb(name):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model
