"""Checkpoints of random numbers in the layouts of other projects."""

from __future__ import annotations

import zlib

import torch
from published import Shapes
from torch import Tensor


def relative_position_index(window: int) -> Tensor:
    """Return Swin's relative position index, pair by pair from its definition."""
    places = [(row, column) for row in range(window) for column in range(window)]
    span = 2 * window - 1
    return torch.tensor(
        [[(a - c + window - 1) * span + (b - d + window - 1) for c, d in places] for a, b in places],
        dtype=torch.int64,
    )


def values(key: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random numbers seeded by the key, so that equal keys get equal values."""
    if key.endswith("relative_position_index"):
        return relative_position_index(int(shape[0] ** 0.5))
    if key.endswith("position_ids"):
        return torch.arange(shape[1])[None]
    generator = torch.Generator().manual_seed(zlib.crc32(untied(key).encode()))
    if not dtype.is_floating_point:
        return torch.randint(0, 100, shape, generator=generator, dtype=dtype)
    scale = 0.3 if len(shape) > 1 else 0.1
    offset = 1.0 if "norm" in key.lower() and key.endswith("weight") else 0.0
    return (offset + scale * torch.randn(shape, generator=generator)).to(dtype)


def untied(key: str) -> str:
    """Return the name that a key shares with its copies: the original layout stores one box head under many names."""
    parts = key.removeprefix("transformer.decoder.").split(".")
    return ".".join(["bbox_embed", *parts[2:]]) if parts[0] == "bbox_embed" else key


def state_dict(shapes: Shapes, dtype: torch.dtype = torch.float32, prefix: str = "") -> dict[str, Tensor]:
    """Return the state dict of a whole checkpoint."""
    return {prefix + key: values(key, shape, dtype) for key, shape in shapes.items()}


def assert_same(back: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    """Check that keys and their order are equal, and every tensor is bit-equal in its dtype."""
    assert list(back) == list(source)
    for key, tensor in source.items():
        assert back[key].dtype == tensor.dtype, key
        assert torch.equal(back[key], tensor), key
