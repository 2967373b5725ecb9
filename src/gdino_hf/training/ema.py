"""Exponential moving average (EMA) of the weights, evaluated and exported in place of the last step's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

EMA_FILE = "average.safetensors"

# The decay starts low and rises, so that the average soon forgets the untrained weights.
_RAMP_STEPS = 10


class ExponentialMovingAverage:
    """Average the trainable parameters of a model: average = d * average + (1 - d) * weights after each step.

    d = min(decay, (1 + step) / (10 + step)). See Polyak and Juditsky 1992 for why averaged weights are better.

    Args:
        model: Model whose parameters with `requires_grad` are averaged; the average starts at their current values.
        decay: Upper limit of d, at least 0 and below 1. A decay of 0.998 averages over about 500 steps.

    Raises:
        ValueError: The decay is out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"The decay of the EMA must be at least 0 and below 1, got {decay}.")
        self.model = model
        self.decay = decay
        self.weights = {name: weight.detach().clone() for name, weight in self._trainable()}

    def _trainable(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the model's current weights.

        Args:
            step: Number of optimizer steps so far.
        """
        decay = min(self.decay, (1 + step) / (_RAMP_STEPS + step))
        for name, parameter in self._trainable():
            self.weights[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the averaged weights inside the `with` block and restore the model's own weights afterwards."""
        own = {name: weight.detach().clone() for name, weight in self._trainable()}
        self.copy_to_model()
        try:
            yield
        finally:
            self._write(own)

    def copy_to_model(self) -> None:
        """Replace the model's weights with the averaged ones."""
        self._write(self.weights)

    @torch.no_grad()
    def _write(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._trainable():
            parameter.copy_(weights[name])

    def save(self, folder: Path) -> None:
        """Write the averaged weights into a checkpoint folder."""
        save_file({name: weight.contiguous() for name, weight in self.weights.items()}, folder / EMA_FILE)

    def load(self, folder: Path) -> None:
        """Read the averaged weights from a checkpoint folder.

        Raises:
            ValueError: The checkpoint has no averaged weights, or those of other parameters.
        """
        path = folder / EMA_FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {EMA_FILE}: it was trained without an EMA; set ema_decay to 0.")
        stored = load_file(path)
        if stored.keys() != self.weights.keys():
            odd = min(stored.keys() ^ self.weights.keys())
            raise ValueError(
                f"{path} averages other parameters than those trained now, for example {odd}; freeze the same groups."
            )
        for name, weight in self.weights.items():
            weight.copy_(stored[name])
