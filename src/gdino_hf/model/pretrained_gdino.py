"""Base class of the models: weight initialization, and what transformers must know about the architecture."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from .configuration_gdino import GDinoConfig
from .fusion import FusionLayer
from .heads import PRIOR_BIAS, BoxHead, ContrastiveHead
from .load_errors import HeadMismatchError, check_finite, plain_load_errors, with_fields
from .ms_deform_attn import MSDeformAttn
from .option_flags import checked_flag
from .stored_model import StoredModel
from .targets import OpaqueLabels, compile_from_below
from .transformers_internals import own_attention
from .weight_files import check_weight_files

logger = logging.get_logger(__name__)

_FORWARD_FLAGS = ("output_attentions", "output_hidden_states", "return_dict")


def wants_dict(config: GDinoConfig, return_dict: bool | None) -> bool:
    """Return whether forward returns an output object, which the configuration decides if the caller does not."""
    return config.return_dict if return_dict is None else return_dict


def say_attention_is_eager(config: GDinoConfig) -> None:
    """Log once that attention weights cost the speed of the selected attention implementation."""
    if config._attn_implementation not in (None, "eager") and not torch.compiler.is_compiling():
        logger.warning_once(
            f"Attention weights were requested, which attn_implementation={config._attn_implementation!r} does not "
            "return: attention is computed eagerly in such calls, which is slower and takes more memory."
        )


def require_gradient(module: nn.Module, args: Any, output: Any) -> None:
    """Make the floating-point tensors of a module's output require a gradient; a forward hook."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            output.requires_grad_(True)
    elif isinstance(output, (tuple, list)):
        for each in output:
            require_gradient(module, args, each)
    elif isinstance(output, dict):
        require_gradient(module, args, tuple(output.values()))


class GDinoPreTrainedModel(StoredModel):
    """Base class of `GDinoModel` and `GDinoForObjectDetection`."""

    config_class = GDinoConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = False
    _supports_flash_attn = False
    _no_split_modules = ["EncoderLayer", "DecoderLayer"]
    # Derived tables, the text encoder's pooler and copies of shared heads, which some programs store with the weights.
    _keys_to_ignore_on_load_unexpected = [
        r"relative_position_index$",
        r"position_ids$",
        r"text_backbone\.pooler\.",
        r"model\.decoder\.(bbox|class)_embed\.",
    ]
    # No published checkpoint holds this table; training learns it if the configuration asks for it.
    _keys_to_ignore_on_load_missing = [r"denoising_label_embedding"]

    _optimized = False  # set by optimize_for_inference

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model as usual; torch.compile starts below this method, so it does not see these tensors' values."""
        if not torch.compiler.is_compiling():
            if kwargs.get("labels") is not None and not isinstance(kwargs["labels"], OpaqueLabels):
                kwargs["labels"] = OpaqueLabels(kwargs["labels"])
            if isinstance(kwargs.get("image_sizes"), torch.Tensor):
                # Sizes decide about shapes, and reading them inside would break the graph.
                kwargs["image_sizes"] = kwargs["image_sizes"].tolist()
            for name in _FORWARD_FLAGS:
                if kwargs.get(name) is not None:
                    kwargs[name] = checked_flag(kwargs[name], name)
        return super().__call__(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, MSDeformAttn):
            init.zeros_(module.sampling_offsets.weight)
            init.copy_(module.sampling_offsets.bias, module.initial_offsets())
            init.zeros_(module.attention_weights.weight)
        elif isinstance(module, FusionLayer) and module.kind == "bi_attention":
            init.constant_(module.vision_param, module.initial_scale)
            init.constant_(module.text_param, module.initial_scale)
        elif isinstance(module, BoxHead):
            # An untrained box head leaves every box where it is.
            init.zeros_(module.layers[-1].weight)
        elif isinstance(module, ContrastiveHead):
            if module.kind != "dot":
                init.constant_(module.bias, PRIOR_BIAS)
            if module.kind == "cosine":
                init.constant_(module.log_temperature, module.initial_log_temperature)
        elif hasattr(module, "level_embed"):
            init.normal_(module.level_embed)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, with checks of its files.

        If the tensors of the heads show that config.json does not describe them, the configuration is changed to what
        they show, and a warning says so. Parameters that no output depends on are frozen.

        Args:
            *args: Arguments of transformers' `from_pretrained`.
            **kwargs: Keyword arguments of transformers' `from_pretrained`.

        Returns:
            The model, or a pair of model and loading information if `output_loading_info` is True.

        Raises:
            OSError: A file is missing or cannot be read.
            ValueError: The files are damaged, do not fit the configuration or each other, name files outside the
                folder, or hold NaN or infinity.
        """
        where = str((args[0] if args else kwargs.get("pretrained_model_name_or_path")) or "The model")
        if isinstance(kwargs.get("device_map"), dict):
            kwargs["device_map"] = dict(kwargs["device_map"])  # loading may change it
        with plain_load_errors(where):
            folder = Path(where) / kwargs.get("subfolder", "")
            if folder.is_dir():
                check_weight_files(folder)
            load = super().from_pretrained
            try:
                loaded = load(*args, **kwargs)
            except HeadMismatchError as error:
                logger.warning(
                    "%s: its weights have other heads than its config.json describes, so it is loaded with %s.",
                    where,
                    error.shown,
                )
                loaded = load(*args, **with_fields(kwargs, error.fields))
            check_finite(loaded[0] if isinstance(loaded, tuple) else loaded, where)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        core = model.base_model
        for name in core.unused_parameters:
            core.get_parameter(name).requires_grad_(False)
        return loaded

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Select the attention implementation of the model and of its backbones, as in transformers.

        Args:
            attn_implementation: "sdpa" or "eager" for all parts, or a dictionary with the keys "" (all but the
                backbones), "backbone_config" and "text_config". A backbone without the implementation requested for
                all parts keeps its own.
            *args: Arguments of transformers' `set_attn_implementation`.
            **kwargs: Keyword arguments of transformers' `set_attn_implementation`.

        Raises:
            ValueError: The implementation does not exist, or the part that the dictionary names does not have it.
        """
        if isinstance(attn_implementation, str):
            core = self.base_model
            parts = {"backbone_config": core.backbone.conv_encoder.model, "text_config": core.text_backbone}
            attn_implementation = {
                "": attn_implementation,
                **{name: own_attention(part, attn_implementation) for name, part in parts.items()},
            }
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def enable_input_require_grads(self) -> None:
        """Make the embeddings' outputs require a gradient, which adapters need under gradient checkpointing.

        The method of transformers fails for Swin, whose embeddings return the size of the map along with the tokens.
        """
        embeddings: dict[int, nn.Module] = {}
        for part in self.modules():
            if isinstance(part, PreTrainedModel):
                try:
                    found = part.get_input_embeddings()
                except NotImplementedError:  # a convolutional backbone
                    continue
                if isinstance(found, nn.Module):
                    embeddings[id(found)] = found
        self._require_grads_hooks = [x.register_forward_hook(require_gradient) for x in embeddings.values()]
        self._require_grads_hook = self._require_grads_hooks[0]

    def optimize_for_inference(self, int8: bool | None = None) -> Any:
        """Rearrange the weights for this machine's CPU; a stub that `import gdino_hf` replaces by the implementation.

        Custom code on the Hub carries only the files of this folder, so without the package this method raises.

        Args:
            int8: Unused here.

        Raises:
            ImportError: The package gdino-hf was not imported before this class was loaded.
        """
        raise ImportError(
            f"{type(self).__module__}.{type(self).__name__} was loaded without gdino-hf, which holds "
            'optimize_for_inference(): pip install "gdino-hf[torch]", then `import gdino_hf` before from_pretrained().'
        )

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation mode.

        Args:
            mode: True for training.

        Returns:
            The model itself.

        Raises:
            ValueError: The model was optimized for inference and cannot train.
        """
        if mode and self._optimized:
            raise ValueError("train() on a model optimized for inference: load it again with from_pretrained to train.")
        return super().train(mode)


compile_from_below(GDinoPreTrainedModel.__call__)
