"""Merge low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) that peft saved into the model they belong to.

    W' = W + s B A        s = alpha / rank, or alpha / sqrt(rank) for rank-stabilized adapters

A file either holds the adapters alone, whose model adapter_config.json or the user names, or the whole model with them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from .architecture import stored_names
from .checkpoint import Checkpoint, read_json
from .conversion_error import ConversionError
from .layouts import find_layout

SETTINGS = "adapter_config.json"
_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<rest>.+)")
# Tensors of adapters of other kinds, which change a weight in another way.
_OTHER_KINDS = re.compile(
    r"\.(lora_embedding_[AB]|lora_magnitude_vector|ia3_l|hada_w\w*|lokr_\w+|oft_\w|boft_\w)(\.|$)"
)


def has_adapters(keys: Iterable[str]) -> bool:
    """Whether tensors with these keys are, or contain, adapters of peft."""
    return any(_MATRIX.fullmatch(key) or _SAVED.fullmatch(key) or _OTHER_KINDS.search(key) for key in keys)


@dataclass
class _Adapters:
    """Tensors of a file, told apart: adapters' matrices, weights that replace the model's, and the model itself."""

    matrices: dict[str, dict[str, str]] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    model: dict[str, str] = field(default_factory=dict)


def merge(checkpoint: Checkpoint, base: str | None, open_base: Callable[[str], Checkpoint], where: Any) -> Checkpoint:
    """Return the model with its adapters merged; values are computed when they are read.

    Args:
        checkpoint: The file or folder with the adapters; it must stay open while the result is read.
        base: Path or Hub id of the model without adapters; None takes the one in the file, or the one that
            adapter_config.json names.
        open_base: Opens the model of such a path or id.
        where: File or folder of the adapters, for messages.

    Returns:
        A checkpoint in the layout of the model.

    Raises:
        ConversionError: The adapters are of another kind, their scale is unknown, or the model is missing or another.
    """
    found = _sort(checkpoint.shapes, where)
    settings = _settings(checkpoint.path, where)
    if found.model:
        model = Checkpoint(checkpoint.path)
        model.config = checkpoint.config
        # Trainers that save the wrapped model write the names that transformers uses in memory.
        on_disk = stored_names(checkpoint.config) if checkpoint.config else {}
        for name, key in found.model.items():
            name = on_disk.get(name, name)
            model.add_reader(name, checkpoint.shapes[key], checkpoint.dtypes[key], partial(checkpoint.read, key))
    else:
        named = base or settings.get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            raise ConversionError(f"{where} does not name the model of its adapters; give --base with its path or id.")
        try:
            model = open_base(named)
        except ConversionError as error:
            raise ConversionError(
                f"{where} belongs to the model {named}, which cannot be opened ({str(error).rstrip('.')}); give --base "
                "with its path or id."
            ) from error
        model.keep_open(checkpoint)
    names = _Names(model, where)
    for module, keys in found.matrices.items():
        name = names.find(f"{module}.weight")
        scale = _scale(settings, module, checkpoint.shapes[keys["A"]][0], where)
        _check_product(module, [checkpoint.shapes[keys[side]] for side in "AB"], model.shapes[name], where)
        b, a = (partial(checkpoint.read, keys[side]) for side in "BA")
        model.replace(name, partial(_merged, model.reader(name), b, a, scale))
    for own, key in found.replaced.items():
        name = names.find(own)
        if model.shapes[name] != checkpoint.shapes[key]:
            raise ConversionError(
                f"{key} of {where} has the shape {checkpoint.shapes[key]}, but the model has {model.shapes[name]}; "
                "give --base the model that was fine-tuned."
            )
        model.replace(name, partial(checkpoint.read, key))
    return model


def _sort(keys: Iterable[str], where: Any) -> _Adapters:
    """Tell a file's tensors apart by their names."""
    found, adapters = _Adapters(), set()
    plain: dict[str, str] = {}
    for key in keys:
        name = key.removeprefix(_PREFIX)
        if _OTHER_KINDS.search(name):
            raise ConversionError(
                f"{where} holds {key}, an adapter of a kind that is not merged here; merge it with peft "
                "(merge_and_unload) and save the result."
            )
        if match := _MATRIX.fullmatch(name):
            found.matrices.setdefault(match["module"], {})[match["side"]] = key
            adapters.add(match["adapter"])
        elif match := _SAVED.fullmatch(name):
            found.replaced[f"{match['module']}.{match['rest']}"] = key
            adapters.add(match["adapter"])
        else:
            plain[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = key
    if len(adapters) > 1:
        shown = ", ".join(sorted(str(name) for name in adapters))
        raise ConversionError(f"{where} holds several adapters ({shown}); save the one to merge alone.")
    incomplete = next((module for module, sides in found.matrices.items() if len(sides) < 2), None)
    if incomplete:
        raise ConversionError(f"{where} holds only one of the two matrices of {incomplete}; fetch it again.")
    # Files of adapters alone hold the weights that replace the model's under the model's own names.
    whole = any(f"{module}.weight" in plain for module in found.matrices)
    found.model.update(plain if whole else {})
    found.replaced.update({} if whole else plain)
    return found


def _settings(path: Path, where: Any) -> dict[str, Any]:
    """Read the settings beside the adapters and refuse those that change more than W + s B A."""
    file = (path if path.is_dir() else path.parent) / SETTINGS
    if not file.is_file():
        raise ConversionError(
            f"{where} has no {SETTINGS} beside it, which holds the scale of its adapters; fetch that file too."
        )
    settings = read_json(file)
    kind = settings.get("peft_type")
    unusual = [
        name for name in ("use_dora", "fan_in_fan_out", "use_qalora", "alora_invocation_tokens") if settings.get(name)
    ]
    if kind != "LORA" or unusual:
        what = f"the kind {kind!r}" if kind != "LORA" else f"{unusual[0]} set"
        raise ConversionError(
            f"The adapters of {where} have {what}, which is not merged here; merge them with peft (merge_and_unload) "
            "and save the result."
        )
    return settings


def _scale(settings: dict[str, Any], module: str, rank: int, where: Any) -> float:
    """Return the factor of an adapter's product, by the rules of peft."""
    alpha = _by_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha"))
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha) or rank < 1:
        raise ConversionError(f"{SETTINGS} of {where} has no number lora_alpha; fetch the file again.")
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return the value of the first pattern that a module's name ends with, or the default."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            continue
    return default


def _check_product(module: str, matrices: list[tuple[int, ...]], weight: tuple[int, ...], where: Any) -> None:
    """Refuse matrices whose product has not the size of the weight."""
    (rank, *inner), (out, *rest) = matrices if all(matrices) else ((0,), (0,))
    if rest[:1] != [rank] or out * math.prod(inner) != math.prod(weight) or weight[:1] != (out,):
        raise ConversionError(
            f"The adapter of {module} in {where} has the shapes {matrices[0]} and {matrices[1]}, which do not fit the "
            f"model's {weight}; give --base the model that was fine-tuned."
        )


def _merged(weight: Callable[[], Tensor], b: Callable[[], Tensor], a: Callable[[], Tensor], scale: float) -> Tensor:
    """Compute W + s B A in float32."""
    base = weight()
    product = b().float().flatten(1) @ a().float().flatten(1)
    return (base.float() + scale * product.reshape(base.shape)).to(base.dtype)


class _Names:
    """Finds a module's tensor in a model's file, where wrappers and transformers may call it otherwise than peft."""

    def __init__(self, model: Checkpoint, where: Any) -> None:
        self.model, self.where = model, where
        layout, self.prefix = find_layout(model.shapes, model.path)
        self.config = model.config if layout.name == "transformers" else None
        self.renamed: dict[str, str] | None = None

    def find(self, name: str) -> str:
        """Return the key of a tensor, given its name in memory."""
        for candidate in (name, self.prefix + name):
            if candidate in self.model.shapes:
                return candidate
        if self.config is not None:
            self.renamed = stored_names(self.config) if self.renamed is None else self.renamed
            if self.renamed.get(name) in self.model.shapes:
                return self.renamed[name]
        raise ConversionError(
            f"{self.where} changes {name}, which {self.model.path} does not hold; give --base the model that was "
            "fine-tuned."
        )
