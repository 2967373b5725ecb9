"""Every use that model/ makes of transformers' undocumented internals, collected in one file.

Tried with transformers 5.23. Each item below says what happens when its part changes in a later release; this file is
then the only one to mend.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, SwinBackbone
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

logger = logging.get_logger(__name__)

_SWIN_BLOCK = ("attention", "layernorm_before", "layernorm_after", "mlp", "shift_size", "window_size")
_SWIN_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "relative_position_bias", "num_attention_heads")
_SWIN_MLP = ("fc1", "fc2", "activation_fn")
_SWIN_MERGING = ("norm", "reduction")


def attention_function(config: PreTrainedConfig) -> Callable[..., Any] | None:
    """Return the attention function that `attn_implementation` selected, or None for eager attention.

    Relies on `config._attn_implementation` and the registry ALL_ATTENTION_FUNCTIONS. If transformers renames either,
    importing the model or its first forward raises ImportError or AttributeError.

    Args:
        config: The model's configuration.

    Returns:
        A function with the signature of transformers' attention functions, such as the one for SDPA.

    Raises:
        KeyError: The selected implementation is not registered.
    """
    name = config._attn_implementation
    return None if name in (None, "eager") else ALL_ATTENTION_FUNCTIONS[name]


def build_part(build: Callable[[], PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a backbone with the attention implementation requested for the whole model, or else with its own.

    A request for the whole model reaches the configurations of both backbones, and classes such as ResNetBackbone
    refuse it in their constructor.

    Args:
        build: Function that builds the backbone from `config`.
        config: The backbone's configuration; a request that its class refuses is removed from it.

    Returns:
        The backbone.
    """
    try:
        return build()
    except ValueError:
        requested = config._attn_implementation
        if requested in (None, "eager"):
            raise
        config._attn_implementation = None
        model = build()
        _report_own_attention(model, requested)
        return model


def own_attention(part: PreTrainedModel, requested: str) -> str:
    """Return the requested attention implementation, or a backbone's present one if its class refuses the request."""
    if not part._can_set_attn_implementation():
        return part.config._attn_implementation
    try:
        return part.get_correct_attn_implementation(requested)
    except ValueError:
        _report_own_attention(part, requested)
        return part.config._attn_implementation


def _report_own_attention(part: PreTrainedModel, requested: str) -> None:
    # Nothing is lost for a convolutional network, which has no attention.
    if getattr(part, "has_attentions", True):
        logger.warning_once(
            f"{type(part).__name__} has no attention implementation {requested!r} and keeps "
            f"{part.config._attn_implementation!r}; the rest of the model uses {requested!r}."
        )


def has_known_swin_parts(backbone: Any) -> bool:
    """Return whether a backbone is transformers' Swin with its sub-modules named as in transformers 5.23.

    The export graph and the CPU path of Swin read those sub-modules directly. If a later release renames them, this
    returns False, and transformers' own forward runs instead: slower on a CPU, and an exported graph then holds for one
    image size only.
    """
    if type(backbone) is not SwinBackbone:
        return False
    try:
        stages = list(backbone.swin.encoder.layers)
        blocks = [block for stage in stages for block in stage.blocks]
        mergings = [stage.downsample for stage in stages if stage.downsample is not None]
        embeddings = backbone.swin.embeddings
        parts: list[tuple[Any, tuple[str, ...]]] = [(block, _SWIN_BLOCK) for block in blocks]
        parts += [(block.attention, _SWIN_ATTENTION) for block in blocks]
        parts += [(block.mlp, _SWIN_MLP) for block in blocks]
        parts += [(merging, _SWIN_MERGING) for merging in mergings]
        parts += [(embeddings, ("norm", "position_embeddings")), (embeddings.patch_embeddings, ("projection",))]
        parts += [(backbone, ("hidden_states_norms", "stage_names", "out_features"))]
    except AttributeError:
        return False
    named = all(hasattr(part, name) for part, names in parts for name in names)
    return named and all(callable(block.attention.relative_position_bias) for block in blocks)


def keep_off_disk(model: PreTrainedModel, device_map: dict[str, Any] | None) -> None:
    """Put parameters that a device map sends to disk by their own name on the main device instead.

    accelerate's hooks fetch the weights of the modules that a map names. A parameter beside sub-modules, such as
    `level_embed`, has no module of its own, so nothing would ever read it back.

    Args:
        model: The model to be loaded.
        device_map: Device of each module or parameter by name, changed in place; None does nothing.
    """
    if device_map is None or "disk" not in device_map.values():
        return
    main_device = next((x for x in device_map.values() if x not in ("cpu", "disk")), "cpu")
    alone = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in [name for name, device in device_map.items() if device == "disk" and name in alone]:
        device_map[name] = main_device
        logger.warning(
            f"device_map puts the parameter {name!r} on disk without its module, from where accelerate could not read "
            f"it back: it stays on {main_device!r}."
        )


class PreTrainedModelHooks(PreTrainedModel):
    """Overrides of private methods of PreTrainedModel, each of which calls a method that subclasses may override.

    If transformers renames one of the private methods, the override is never called: files of weights load
    without checks, box heads and deformable attention of a new model start from their layers' default
    initialization, or a pushed model keeps transformers' placeholder card. tests/model has a test of each.
    """

    def check_checkpoint(
        self, state_dict: dict[str, Tensor] | None, files: list[str] | None, exact: bool, is_quantized: bool = False
    ) -> tuple[dict[str, Tensor] | None, list[str] | None]:
        """Look at a checkpoint before its weights are loaded.

        Args:
            state_dict: The weights by name, or None if they are in files.
            files: Paths of the weight files, or None if there are none.
            exact: Whether all tensors must have the shapes that the configuration describes.
            is_quantized: Whether a quantizer of transformers reads the weights.

        Returns:
            The weights to load, in the same two forms.
        """
        return state_dict, files

    def write_card(self, folder: Any, repository: str) -> None:
        """Write the model card just before a folder is pushed to the Hub.

        Args:
            folder: The folder to be pushed.
            repository: Hub id of the repository.
        """

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        # Only this method receives the paths of the files, in a local folder or in the Hub's cache.
        # Adapters of peft, which load with the names that they consist of, are no checkpoint of the whole model.
        if len(args) > 1 or "expected_keys" in kwargs:
            return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)
        # Quantized files and `ignore_mismatched_sizes` have tensors of other shapes.
        options = args[0] if args else kwargs.get("load_config")
        keep_off_disk(model, getattr(options, "device_map", None))
        # transformers skips, with a line in the log, a quantization_config of a method that it does not know.
        is_quantized = getattr(options, "hf_quantizer", None) is not None
        exact = not (getattr(options, "ignore_mismatched_sizes", False) or is_quantized)
        state_dict, checkpoint_files = model.check_checkpoint(state_dict, checkpoint_files, exact, is_quantized)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def _initialize_weights(self, module: Any, *args: Any, **kwargs: Any) -> None:
        # For classes outside transformers, the stock method is told to skip modules without parameters of their own,
        # such as BoxHead and MSDeformAttn. Initializing them is safe: the functions of transformers.initialization
        # leave parameters alone that were loaded.
        super()._initialize_weights(module)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # At this point transformers has already overwritten the card with its placeholder.
        self.write_card(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def tensors_as_stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a model's tensors under their names in memory and, where they differ, in files.

    If transformers moves `revert_weight_conversion`, importing this file raises ImportError.
    """
    tensors = model.state_dict()
    return {**tensors, **revert_weight_conversion(model, dict(tensors))}


def rename_as_in_memory(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and join tensors from a file the way from_pretrained does, for use with `load_state_dict`.

    transformers 5 gives some weights other names in memory than in files, and joins some that files hold apart. If a
    later release moves its conversion tables, importing this file raises ImportError.

    Args:
        model: The model that will receive the tensors.
        stored: Tensors by their names in the file.

    Returns:
        Tensors by their names in memory. Tensors that the model has no parameter or buffer for keep their names.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        # The model was not loaded from a file. save_pretrained then writes neither legacy names nor prefixes.
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
