"""Time the whole model, eager and compiled, against transformers' Grounding DINO of the same shape."""

from typing import Any

import torch
from measure import alternate
from operators import backend
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

from gdino_hf import GDinoConfig, GDinoForObjectDetection


def published_shape() -> tuple[GDinoConfig, GroundingDinoConfig]:
    """Configurations of Grounding DINO tiny, this package's and transformers'."""
    return GDinoConfig.preset("tiny"), GroundingDinoConfig()


def make_batch(batch: int, height: int, width: int, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """Random images with the prompt "[CLS] cat . remote control . [SEP]" of seven tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[101, 4937, 1012, 6556, 2491, 1012, 102]]).expand(batch, -1).contiguous()
    inputs = {
        "pixel_values": torch.randn(batch, 3, height, width, generator=generator).to(dtype),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def time_models(
    configs: tuple[Any, Any],
    dtype: torch.dtype,
    device: str,
    backends: list[str],
    batches: tuple[int, ...] = (1, 8),
    size: tuple[int, int] = (800, 1066),
    repeats: int = 7,
    modes: tuple[str, ...] = ("eager", "compiled"),
) -> list[dict[str, Any]]:
    """Time a forward of transformers and of this package with each backend and with PyTorch's operations.

    Returns:
        One row per mode and batch size, with median milliseconds by name.
    """
    torch.manual_seed(0)
    ours = GDinoForObjectDetection(configs[0]).eval().to(device, dtype)
    theirs = GroundingDinoForObjectDetection(configs[1]).eval().to(device, dtype)
    rows = []
    for mode in modes:
        for batch in batches:
            inputs = make_batch(batch, *size, dtype, device)
            functions = {"transformers": _forward(theirs, inputs, "torch", mode)}
            for name in (*backends, "torch"):
                functions[f"gdino_hf {name}"] = _forward(ours, inputs, name, mode)
            # A compiled graph keeps the backend it was traced with, so compiled models run one after the other.
            turns = [functions] if mode == "eager" else [{name: function} for name, function in functions.items()]
            times: dict[str, Any] = {}
            for turn in turns:
                torch.compiler.reset()
                times |= alternate(turn, device, repeats)
            rows.append(
                {
                    "mode": mode,
                    "batch": batch,
                    "dtype": str(dtype).removeprefix("torch."),
                    "milliseconds": times,
                }
            )
    return rows


def _forward(model: torch.nn.Module, inputs: dict[str, torch.Tensor], name: str, mode: str) -> Any:
    module = torch.compile(model, mode="reduce-overhead") if mode == "compiled" else model

    def run() -> None:
        with backend(name), torch.no_grad():
            module(**inputs)

    return run
