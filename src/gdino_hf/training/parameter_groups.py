"""Three parameter groups with a learning rate each: image backbone, text encoder, and trunk (everything else)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

GROUPS = ("backbone", "text", "trunk")

_PREFIXES = {"model.backbone.": "backbone", "model.text_backbone.": "text"}
# Prefixes that DistributedDataParallel and peft put before a model's own names.
_WRAPPERS = ("module.", "base_model.model.")


def group_of(name: str) -> str:
    """Return the group that a parameter belongs to.

    Args:
        name: Name in `model.named_parameters()`, of a plain model or of one with adapters.

    Returns:
        "backbone", "text" or "trunk".
    """
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return next((group for prefix, group in _PREFIXES.items() if name.startswith(prefix)), "trunk")


def group_modules(model: Any, group: str) -> list[nn.Module]:
    """Return the modules that make up a group, without listing any module inside another.

    Args:
        model: A GDinoForObjectDetection.
        group: "backbone", "text" or "trunk".

    Returns:
        The modules.
    """
    pretrained = {"backbone": model.model.backbone, "text": model.model.text_backbone}
    if group in pretrained:
        return [pretrained[group]]
    others = [child for child in model.model.children() if all(child is not one for one in pretrained.values())]
    return [*others, *(child for child in model.children() if child is not model.model)]


def check_groups(groups: Iterable[str]) -> list[str]:
    """Return group names without duplicates; "none" stands for no group.

    Raises:
        ValueError: A name is not that of a group.
    """
    known = [group for group in dict.fromkeys(groups) if group != "none"]
    for group in known:
        if group not in GROUPS:
            raise ValueError(
                f"There is no parameter group {group!r} to freeze; choose among {', '.join(GROUPS)}, or none."
            )
    return known


def freeze(model: Any, groups: Iterable[str]) -> list[nn.Module]:
    """Exclude whole parameter groups from training.

    Args:
        model: A GDinoForObjectDetection.
        groups: Names of groups.

    Returns:
        The frozen modules. Keep them in eval mode while training: their dropout would only add noise.

    Raises:
        ValueError: A name is not that of a group.
    """
    frozen = check_groups(groups)
    for name, parameter in model.named_parameters():
        if group_of(name) in frozen:
            parameter.requires_grad_(False)
    return [module for group in frozen for module in group_modules(model, group)]


def optimizer_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Build an optimizer's parameter list: one learning rate per group, no weight decay on norms, biases and scales.

    Args:
        model: Model whose parameters with `requires_grad` are optimized.
        learning_rate: Peak learning rate of the trunk.
        weight_decay: Weight decay of matrices and convolution kernels.
        factors: Factor on the learning rate by group; 1 for a group that is not named.

    Returns:
        Non-empty dictionaries with "params", "lr", "weight_decay" and "group".

    Raises:
        ValueError: No parameter requires a gradient.
    """
    found: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault((group_of(name), parameter.ndim > 1), []).append(parameter)
    if not found:
        raise ValueError("All parameters are frozen, so there is nothing to train; freeze fewer groups or use LoRA.")
    return [
        {
            "params": parameters,
            "lr": learning_rate * factors.get(group, 1.0),
            "weight_decay": weight_decay if is_matrix else 0.0,
            "group": group,
        }
        # The trunk comes first because Trainer logs the learning rate of the first entry.
        for (group, is_matrix), parameters in sorted(found.items(), key=lambda item: item[0], reverse=True)
    ]


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Count the parameters of each group.

    Args:
        model: The model.

    Returns:
        (number of parameters, number of trainable parameters) by group.
    """
    counts = {group: [0, 0] for group in GROUPS}
    for name, parameter in model.named_parameters():
        counts[group_of(name)][0] += parameter.numel()
        counts[group_of(name)][1] += parameter.numel() * parameter.requires_grad
    return {group: (total, trainable) for group, (total, trainable) in counts.items()}
