"""What saving and loading add to transformers: copies of heads, names in files, auto classes, the model card."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .configuration_gdino import GDinoConfig
from .model_card import write_model_card
from .transformers_internals import PreTrainedModelHooks, rename_as_in_memory

logger = logging.getLogger(__name__)

_HEAD = re.compile(r"^(?P<decoder>model\.decoder\.)?(?P<name>bbox|class)_embed\.(?P<layer>\d+)\.(?P<rest>.+)$")


class StoredModel(PreTrainedModelHooks):
    """Base class for loading, saving and pushing Grounding DINO models."""

    def check_checkpoint(self, state_dict: Mapping[str, Tensor] | None, files: list[str] | None) -> None:
        """Warn if the checkpoint holds copies of a shared head whose values differ; see `differing_copies`."""
        differing = differing_copies(state_dict, files, self.config)
        if differing:
            logger.warning(
                "The checkpoint holds copies of heads that differ from the heads: %s. This model uses one head in "
                "both places and ignores the copies, so its results may differ from those of the code that trained it.",
                ", ".join(differing),
            )

    def write_card(self, folder: Any, repository: str) -> None:
        """Replace transformers' placeholder card, but no other card, by the model card."""
        write_model_card(folder, self.config, name=repository, replace_placeholder=True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Trainer resumes from a checkpoint, and returns to the best one, by load_state_dict(file, strict=False). That
        # would silently skip every backbone weight whose name in the file differs from its name in memory.
        own = self.state_dict().keys()
        stored = {key: key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        stored = {key: name for key, name in stored.items() if name not in own}
        renamed = rename_as_in_memory(self, {name: state_dict[key] for key, name in stored.items()}) if stored else {}
        for key in stored:
            del state_dict[key]
        state_dict.update({prefix + name: tensor for name, tensor in renamed.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> Any:
        """Save as transformers does, and write a model card unless the folder has one.

        A model marked as custom code (`register_for_auto_class`) also gets both of its auto classes into auto_map.

        Args:
            save_directory: Folder to write to.
            is_main_process: Whether this process writes the files that all processes share.
            **kwargs: Further arguments of transformers' `save_pretrained`.
        """
        if self._auto_class is not None:
            # transformers adds only the class being saved.
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


def differing_copies(
    state_dict: Mapping[str, Tensor] | None, files: Sequence[str | Path] | None, config: GDinoConfig
) -> list[str]:
    """Find copies of shared heads, under the decoder or for every layer, whose values differ from the original.

    Args:
        state_dict: The weights by name, or None if they are in files.
        files: Weight files; only safetensors files are read.
        config: The model's configuration, which says whether the layers share their heads.

    Returns:
        Names of the copies that differ from the head used here, such as "model.decoder.bbox_embed.1".
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
