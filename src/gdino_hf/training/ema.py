"""A moving average of the weights (Polyak and Juditsky 1992), measured and shipped in place of the last step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

AVERAGE_FILE = "average.safetensors"

# Before this many steps the average reaches back less far, so that it forgets the untrained start quickly.
_RAMP = 10


class WeightAverage:
    """Exponential moving average of what trains in a model: average = d * average + (1 - d) * weights after each step.

    d rises from 2/11 as (1 + step) / (10 + step) to its limit.

    Args:
        model: Its parameters that require a gradient are averaged; the average starts from them.
        decay: The limit of d, within 0..1, 1 excluded. 0.998 reaches back over about 500 steps.

    Raises:
        ValueError: The decay is out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"The decay of the weight average must be at least 0 and below 1, got {decay}.")
        self.model = model
        self.decay = decay
        self.weights = {name: weight.detach().clone() for name, weight in self._trained()}

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after a step.

        Args:
            step: How many steps there were.
        """
        decay = min(self.decay, (1 + step) / (_RAMP + step))
        for name, parameter in self._trained():
            self.weights[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model computes with the average; afterwards it has its own weights again."""
        own = {name: weight.detach().clone() for name, weight in self._trained()}
        self.put_into_model()
        try:
            yield
        finally:
            self._write(own)

    def put_into_model(self) -> None:
        """Replace the model's weights by the average."""
        self._write(self.weights)

    @torch.no_grad()
    def _write(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._trained():
            parameter.copy_(weights[name])

    def save(self, folder: Path) -> None:
        """Write the average beside a checkpoint."""
        save_file({name: weight.contiguous() for name, weight in self.weights.items()}, folder / AVERAGE_FILE)

    def load(self, folder: Path) -> None:
        """Go on from the average beside a checkpoint.

        Raises:
            ValueError: It is the average of other parameters.
        """
        path = folder / AVERAGE_FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {AVERAGE_FILE}: it was trained without an average; set ema_decay to 0.")
        stored = load_file(path)
        if stored.keys() != self.weights.keys():
            odd = min(stored.keys() ^ self.weights.keys())
            raise ValueError(
                f"{path} averages other parameters than are trained now, {odd} for instance; freeze the same parts."
            )
        for name, weight in self.weights.items():
            weight.copy_(stored[name])
