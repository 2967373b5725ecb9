"""Infer heads and points of deformable attention, which tensors show only as a product with the number of levels."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdino_hf.model.ms_deform_attn import MSDeformAttn

from .conversion_error import ConversionError

PUBLISHED_HEADS, PUBLISHED_POINTS = 8, 4
_MODULES = {"encoder": "deformable_layer.self_attn", "decoder": "encoder_attn"}
# Noise of a quarter of the first point's distance on every coordinate leaves the true split a cosine of 0.98; the
# nearest wrong split (half the heads or twice as many) has one of 0.6 to 0.91.
_LEAST_COSINE, _LEAST_LEAD = 0.8, 0.05


def attention_sizes(
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    *,
    levels: int,
    fits: Callable[[str, int], bool],
    given: Mapping[str, Any],
    where: Any,
) -> tuple[dict[str, int], list[str]]:
    """Split the number of samples per query of encoder and decoder into heads, levels and points.

    Every split that the model could be built with is tried. The initial bias of the sampling offsets has a direction
    for each head and a distance for each point, and training keeps most of it, so a split whose pattern the stored bias
    still follows is taken. Without such a pattern, it is the published split (8 heads, 4 points) if it fits, otherwise
    one with the published number of points, otherwise one with the published number of heads.

    Args:
        shapes: Shapes by our key.
        read: Returns the tensor of one of our keys.
        levels: Number of feature levels.
        fits: Whether the model can have a number of heads, given "encoder" or "decoder" and that number.
        given: Configuration fields that the user set, which are not changed.
        where: File or folder of the checkpoint, for messages.

    Returns:
        The configuration fields, and one sentence for each assumption that was necessary.

    Raises:
        ConversionError: No split fits the tensors, or the user's fields contradict them.
    """
    fields: dict[str, int] = {}
    assumed: list[str] = []
    for part, module in _MODULES.items():
        weights = re.compile(rf"(model\.{part}\.layers\.\d+\.{re.escape(module)}\.)attention_weights\.(weight|bias)")
        found = {key: match[1] for key in shapes if (match := weights.fullmatch(key)) and shapes[key]}
        if not found:
            continue
        layers = list(dict.fromkeys(found.values()))
        samples = Counter(shapes[key][0] for key in found).most_common(1)[0][0]
        names = (f"{part}_attention_heads", f"{part}_n_points")
        fitting = [split for split in _splits(samples, levels) if _agrees(split, names, given)]
        usable = [split for split in fitting if fits(part, split[0])]
        if not usable:
            raise ConversionError(
                f"The {part} of {where} samples {samples} places per query, which no number of heads that fits its "
                f"width splits over {levels} levels{' as --config says' if set(names) & set(given) else ''}; give "
                f'--config a file with {{"{names[0]}": ..., "{names[1]}": ...}}, or the checkpoint of a whole '
                "Grounding DINO."
            )
        chosen = _by_offsets(usable, layers, shapes, read, levels) or usable[0]
        fields.update(zip(names, chosen, strict=True))
        others = [split for split in usable if split != chosen]
        if others and not set(names) & set(given):
            assumed.append(
                f"the {part}'s attention has {_words(chosen)} a level (tensors show only the product; "
                f"{' or '.join(map(_words, others[:2]))} would fit too, and --config changes it)"
            )
    return fields, assumed


def _splits(samples: int, levels: int) -> list[tuple[int, int]]:
    """Return all (heads, points) whose product with the levels is the number of samples, the likeliest first."""
    if levels < 1 or samples % levels:
        return []
    product = samples // levels
    small = [number for number in range(1, math.isqrt(product) + 1) if product % number == 0]
    splits = [(heads, product // heads) for heads in sorted({*small, *(product // number for number in small)})[::-1]]

    def unlikely(split: tuple[int, int]) -> tuple[bool, bool]:
        return split[1] != PUBLISHED_POINTS, split[0] != PUBLISHED_HEADS

    return sorted(splits, key=unlikely)


def _agrees(split: tuple[int, int], names: tuple[str, str], given: Mapping[str, Any]) -> bool:
    """Whether a split has the numbers that the user gave."""
    return all(given.get(name, number) == number for name, number in zip(names, split, strict=True))


def _by_offsets(
    splits: list[tuple[int, int]],
    layers: list[str],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    levels: int,
) -> tuple[int, int] | None:
    """Return the split whose initial offsets the stored biases resemble more than the first one's, or None."""
    keys = [f"{layer}sampling_offsets.bias" for layer in layers]
    size = splits[0][0] * splits[0][1] * levels * 2
    biases = [read(key).float() for key in keys if shapes.get(key) == (size,)]
    if not biases:
        return None
    mean = torch.nan_to_num(torch.stack(biases)).mean(0)
    cosines = {}
    for heads, points in splits:
        with torch.device("meta"):
            attention = MSDeformAttn(heads, levels, heads, points)
        cosines[heads, points] = float(F.cosine_similarity(mean, attention.initial_offsets(), dim=0))
    best = max(splits, key=cosines.__getitem__)
    leads = cosines[best] - cosines[splits[0]] >= _LEAST_LEAD
    return best if leads and cosines[best] >= _LEAST_COSINE else None


def _words(split: tuple[int, int]) -> str:
    """Format a split: "8 heads of 3 points"."""
    return f"{split[0]} head{'s' * (split[0] != 1)} of {split[1]} point{'s' * (split[1] != 1)}"
