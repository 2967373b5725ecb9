"""What saving and loading add to transformers: copies of heads, names in files, auto classes, the model card."""

import logging
from typing import Any

from torch import Tensor

from .load_errors import HeadMismatchError
from .model_card import write_model_card
from .transformers_internals import PreTrainedModelHooks, rename_as_in_memory, tensors_as_stored
from .weight_files import (
    check_amount,
    check_dtypes,
    check_shapes,
    differing_copies,
    dtype_name,
    fitting_heads,
    head_tensors,
    read_all,
    single_numbers,
    stored_dtypes,
    stored_shapes,
)

logger = logging.getLogger(__name__)


class StoredModel(PreTrainedModelHooks):
    """Base class for loading, saving and pushing Grounding DINO models."""

    def check_checkpoint(
        self, state_dict: dict[str, Tensor] | None, files: list[str] | None, exact: bool, is_quantized: bool = False
    ) -> tuple[dict[str, Tensor] | None, list[str] | None]:
        """Check a checkpoint against the configuration before its weights are loaded.

        Args:
            state_dict: The weights by name, or None if they are in files.
            files: Paths of the weight files, or None if there are none.
            exact: Whether all tensors must have the shapes that the configuration describes.
            is_quantized: Whether a quantizer of transformers reads the weights.

        Returns:
            Both, with tensors in the shapes that this model has.

        Raises:
            HeadMismatchError: The tensors show other heads than the configuration; `from_pretrained` adapts it.
            ValueError: The weights cannot belong to this configuration.
        """
        stored = stored_shapes(files or ())
        shapes = {**stored, **{key: tuple(tensor.shape) for key, tensor in (state_dict or {}).items()}}
        if exact:
            check_amount(self, stored)
        if not is_quantized:
            dtypes = {
                **stored_dtypes(files or ()),
                **{key: dtype_name(value) for key, value in (state_dict or {}).items()},
            }
            check_dtypes(dtypes, tensors_as_stored(self))
        fields = fitting_heads(shapes, head_tensors(state_dict, files), self.config, exact)
        if fields:
            raise HeadMismatchError(fields)
        if exact:
            check_shapes(shapes, {name: tuple(tensor.shape) for name, tensor in tensors_as_stored(self).items()})
        differing = differing_copies(state_dict, files, self.config)
        if differing:
            logger.warning(
                "The checkpoint holds copies of heads that differ from the heads: %s. This model uses one head in "
                "both places and ignores the copies, so its results may differ from those of the code that trained it.",
                ", ".join(differing),
            )
        vectors = single_numbers(shapes)
        if vectors:
            state_dict, files = {**(state_dict or {}), **read_all(files or ())}, None
            state_dict.update({key: state_dict[key].reshape(()) for key in vectors})
        return state_dict, files

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
