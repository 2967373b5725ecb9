"""The parts of a model that train at their own pace: image backbone, text encoder, and the trunk, all the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

PARTS = ("backbone", "text", "trunk")

_PREFIXES = {"model.backbone.": "backbone", "model.text_backbone.": "text"}
_ADAPTED = "base_model.model."


def part_of(name: str) -> str:
    """The part a parameter belongs to.

    Args:
        name: As in `model.named_parameters()`, of a plain model or one with adapters around it.

    Returns:
        "backbone", "text" or "trunk".
    """
    name = name.removeprefix("module.").removeprefix(_ADAPTED)
    return next((part for prefix, part in _PREFIXES.items() if name.startswith(prefix)), "trunk")


def part_modules(model: Any, part: str) -> list[nn.Module]:
    """The largest modules that lie within one part.

    Args:
        model: A GDinoForObjectDetection.
        part: "backbone", "text" or "trunk".

    Returns:
        The modules.
    """
    pinned = {"backbone": model.model.backbone, "text": model.model.text_backbone}
    if part in pinned:
        return [pinned[part]]
    others = [child for child in model.model.children() if all(child is not one for one in pinned.values())]
    return [*others, *(child for child in model.children() if child is not model.model)]


def check_parts(parts: Iterable[str]) -> list[str]:
    """Names of parts, each once; "none" stands for no part.

    Raises:
        ValueError: There is no such part.
    """
    known = [part for part in dict.fromkeys(parts) if part != "none"]
    for part in known:
        if part not in PARTS:
            raise ValueError(f"There is no part {part!r} to freeze; choose among {', '.join(PARTS)}, or none.")
    return known


def freeze(model: Any, parts: Iterable[str]) -> list[nn.Module]:
    """Stop the training of whole parts.

    Args:
        model: A GDinoForObjectDetection.
        parts: Names of parts.

    Returns:
        The frozen modules, which whoever trains the rest keeps in eval mode: dropout inside them would only add noise.

    Raises:
        ValueError: There is no such part.
    """
    wanted = check_parts(parts)
    for name, parameter in model.named_parameters():
        if part_of(name) in wanted:
            parameter.requires_grad_(False)
    return [module for part in wanted for module in part_modules(model, part)]


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """What an optimizer takes: one learning rate per part, and no weight decay on norms, biases and scales.

    Args:
        model: Only what requires a gradient takes part.
        learning_rate: Of the trunk.
        weight_decay: Of matrices and convolutions.
        factors: On the learning rate, by part; 1 for a part that is not named.

    Returns:
        Groups with "params", "lr", "weight_decay" and "part", none of them empty.

    Raises:
        ValueError: Nothing requires a gradient.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise ValueError("Every part is frozen, so nothing can be trained; freeze fewer parts or use LoRA.")
    return [
        {
            "params": parameters,
            "lr": learning_rate * factors.get(part, 1.0),
            "weight_decay": weight_decay if is_matrix else 0.0,
            "part": part,
        }
        # The trunk first: its rate is the one that Trainer logs.
        for (part, is_matrix), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def count_parameters(model: nn.Module, parts: Sequence[str] = PARTS) -> dict[str, tuple[int, int]]:
    """How many parameters each part has, and how many of them train.

    Args:
        model: The model.
        parts: Names of parts.

    Returns:
        (all, trained) by part.
    """
    counts = {part: [0, 0] for part in parts}
    for name, parameter in model.named_parameters():
        counts[part_of(name)][0] += parameter.numel()
        counts[part_of(name)][1] += parameter.numel() * parameter.requires_grad
    return {part: (everything, trained) for part, (everything, trained) in counts.items()}
