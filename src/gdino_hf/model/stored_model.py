"""Weights on disk and on the Hub: copies of heads that files hold besides, auto classes, the model card."""

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key

from .configuration_gdino import GDinoConfig
from .model_card import write_model_card

logger = logging.getLogger(__name__)

_HEAD = re.compile(r"^(?P<decoder>model\.decoder\.)?(?P<name>bbox|class)_embed\.(?P<layer>\d+)\.(?P<rest>.+)$")


class StoredModel(PreTrainedModel):
    """What loading, saving and pushing do beyond transformers."""

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        # The one place where the files are known, whether they lie in a folder or in the Hub's cache.
        differing = differing_copies(state_dict, checkpoint_files, model.config)
        if differing:
            logger.warning(
                "The checkpoint holds copies of heads that differ from the heads: %s. They are left out, since one "
                "head serves both places here, so results may differ from those of the code that trained it.",
                ", ".join(differing),
            )
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Trainer resumes, and returns to the best checkpoint, by load_state_dict(file, strict=False), which would pass
        # over every weight of a backbone whose names in files are not those in memory.
        own = self.state_dict().keys()
        stored = {key: key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        stored = {key: name for key, name in stored.items() if name not in own}
        renamed = named_as_in_memory(self, {name: state_dict[key] for key, name in stored.items()}) if stored else {}
        for key in stored:
            del state_dict[key]
        state_dict.update({prefix + name: tensor for name, tensor in renamed.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> Any:
        """As in transformers; also writes a model card, and as Hub custom code names both auto classes.

        Args:
            save_directory: The folder.
            is_main_process: Whether this process writes what all share.
            **kwargs: As in transformers.
        """
        if self._auto_class is not None:
            # Only the class being saved enters auto_map by itself.
            module = type(self).__module__.rpartition(".")[-1]
            self.config.auto_map = {
                **(getattr(self.config, "auto_map", None) or {}),
                "AutoModel": f"{module}.GDinoModel",
                "AutoModelForZeroShotObjectDetection": f"{module}.GDinoForObjectDetection",
            }
        result = super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_model_card(save_directory, self.config)
        return result

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # The last step before files leave for the Hub, after transformers has put its placeholder over the card.
        write_model_card(working_dir, self.config, name=repo_id, replace_placeholder=True)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def named_as_in_memory(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as files name and split them, as transformers 5 names and joins them in memory: from_pretrained's way.

    Args:
        model: The model that is to take them.
        stored: Tensors by their names on disk.

    Returns:
        Tensors by the model's names; what the model has no place for keeps its name.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        # As save_pretrained decides for a model that was not loaded: neither legacy names nor prefixes are written.
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [x for x in conversions if not isinstance(x, PrefixChange)]
    renamings = [x for x in conversions if isinstance(x, WeightRenaming)]
    converters = [x for x in conversions if isinstance(x, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    own = model.state_dict().keys()
    result: dict[str, Tensor] = {}
    parts: dict[str, WeightConverter] = {}
    for key, tensor in stored.items():
        name, pattern = rename_source_key(key, renamings, converters)
        if name not in own:
            result[key] = tensor
        elif pattern is None:
            result[name] = tensor
        else:
            parts.setdefault(name, copy.deepcopy(by_pattern[pattern])).add_tensor(name, key, pattern, tensor)
    for name, converter in parts.items():
        for target, value in converter.convert(name, model=model, config=model.config).items():
            result[target] = value[0] if isinstance(value, list) else value
    return result


def differing_copies(
    state_dict: Mapping[str, Tensor] | None, files: Sequence[str | Path] | None, config: GDinoConfig
) -> list[str]:
    """Heads that other writers stored once more, under the decoder or for every layer, with other values.

    Args:
        state_dict: The weights, or None if they are in files.
        files: Files of weights; those that are not safetensors are not looked into.
        config: Says which heads all layers share.

    Returns:
        The modules that differ from the head that takes their place here, such as "model.decoder.bbox_embed.1".
    """
    heads = {key: tensor for key, tensor in (state_dict or {}).items() if _HEAD.match(key)}
    for path in files or ():
        if Path(path).suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                heads |= {key: file.get_tensor(key) for key in file.keys() if _HEAD.match(key)}  # noqa: SIM118
    shared = {"bbox": config.decoder_bbox_embed_share, "class": config.decoder_cls_embed_share}
    differing = set()
    for key, tensor in heads.items():
        match = _HEAD.match(key)
        assert match is not None
        name, layer = match["name"], match["layer"]
        head = heads.get(f"{name}_embed.{0 if shared[name] else layer}.{match['rest']}")
        if head is not None and not torch.equal(head, tensor):
            differing.add(f"{match['decoder'] or ''}{name}_embed.{layer}")
    return sorted(differing)
