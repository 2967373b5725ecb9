"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) on the trunk, with the heads trained in full."""

from __future__ import annotations

from typing import Any

from torch import nn

from .parameter_groups import group_of

_HEADS = ("bbox_embed", "class_embed", "encoder_output_bbox_embed", "encoder_output_class_embed")


def add_adapters(model: Any, rank: int, alpha: float | None = None, dropout: float = 0.0) -> Any:
    """Freeze a model and add adapters to every linear layer of its encoder and decoder.

    Args:
        model: A GDinoForObjectDetection.
        rank: Rank of the adapters, at least 1.
        alpha: The adapters' output is scaled by alpha / rank; alpha is twice the rank by default.
        dropout: Dropout probability on the adapters' input, in [0, 1).

    Returns:
        A PeftModel around the model. Box and class heads train in full: they are small, and new labels need them most.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('Low-rank adapters need peft; pip install "gdino-hf[train]".') from error
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(("model.encoder.", "model.decoder."))
        and group_of(name) == "trunk"
    ]
    return get_peft_model(
        model,
        LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]  # annotated int, any number works
            lora_dropout=dropout,
            target_modules=targets,
            modules_to_save=head_names(model),
        ),
    )


def head_names(model: Any) -> list[str]:
    """Return the names of the box and class heads, which `add_adapters` trains in full."""
    names = []
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        # peft cannot wrap a ModuleList, so its members are named one by one.
        if last in _HEADS and isinstance(module, nn.ModuleList):
            names += [f"{name}.{index}" for index in range(len(module))]
        elif last in _HEADS:
            names.append(name)
    return names


def merge_adapters(model: Any) -> Any:
    """Add the adapters to the weights below them and remove the adapters.

    Args:
        model: A model from `add_adapters`, or one without adapters, which is returned unchanged.

    Returns:
        A plain GDinoForObjectDetection.
    """
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
