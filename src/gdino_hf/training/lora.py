"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on the trunk, with the heads trained in full."""

from __future__ import annotations

from typing import Any

from torch import nn

from .parameter_groups import part_of

_HEADS = ("bbox_embed", "class_embed", "encoder_output_bbox_embed", "encoder_output_class_embed")


def add_adapters(model: Any, rank: int, alpha: float | None = None, dropout: float = 0.0) -> Any:
    """Freeze a model and put adapters on every linear layer of its encoder and decoder.

    Args:
        model: A GDinoForObjectDetection.
        rank: Of the adapters, at least 1.
        alpha: Their scale is alpha / rank; alpha is twice the rank by default.
        dropout: On what enters them, 0..1.

    Returns:
        A PeftModel around the model. Box and class heads train in full: they are small, and new names need them most.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('Low-rank adapters need peft; pip install "gdino-hf[train]".') from error
    heads = head_names(model)
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(("model.encoder.", "model.decoder."))
        and part_of(name) == "trunk"
    ]
    return get_peft_model(
        model,
        LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]  # any number will do
            lora_dropout=dropout,
            target_modules=targets,
            modules_to_save=heads,
        ),
    )


def head_names(model: Any) -> list[str]:
    """Modules that `add_adapters` leaves whole."""
    names = []
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        # Heads of single layers stand in a list, which peft does not wrap.
        if last in _HEADS and isinstance(module, nn.ModuleList):
            names += [f"{name}.{index}" for index in range(len(module))]
        elif last in _HEADS:
            names.append(name)
    return names


def merge_adapters(model: Any) -> Any:
    """Add the adapters to the weights they stand on.

    Args:
        model: From `add_adapters`, or a model without adapters, which stays as it is.

    Returns:
        A plain GDinoForObjectDetection.
    """
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
