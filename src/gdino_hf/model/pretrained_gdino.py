"""What all models of the family share: initialization, and inference laid out for the machine."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .configuration_gdino import GDinoConfig
from .fusion import FusionLayer
from .heads import PRIOR_BIAS, BoxHead, ContrastiveHead
from .ms_deform_attn import MSDeformAttn
from .stored_model import StoredModel


class GDinoPreTrainedModel(StoredModel):
    """Initialization, loading and what transformers must know of the architecture."""

    config_class = GDinoConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = False
    _supports_flash_attn = False
    _no_split_modules = ["EncoderLayer", "DecoderLayer"]
    # Derived tables, and copies of tied heads, that other writers of these layouts store beside the weights.
    _keys_to_ignore_on_load_unexpected = [
        r"relative_position_index$",
        r"position_ids$",
        r"text_backbone\.pooler\.",
        r"model\.decoder\.(bbox|class)_embed\.",
    ]
    # Learned only where training asks for it; no public checkpoint of these layouts holds it.
    _keys_to_ignore_on_load_missing = [r"denoising_label_embedding"]

    def _initialize_weights(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        # For classes outside transformers the stock method passes over modules without parameters of their own, such as
        # BoxHead and MSDeformAttn; the functions of `init` ask every parameter itself whether it was loaded.
        super()._initialize_weights(module)

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
            # Untrained heads leave every box where it is.
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
        """As in transformers; what no output depends on stays frozen, which loading would undo.

        Args:
            *args: As in transformers.
            **kwargs: As in transformers.

        Returns:
            The model, or with `output_loading_info` the model and the information.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        core = model.base_model
        for name in core._never_trained:
            core.get_parameter(name).requires_grad_(False)
        return loaded

    _optimized = False

    def optimize_for_inference(self, int8: bool | None = None) -> Any:
        """Lay the weights out for this machine's CPU. The gdino-hf package installs the real method on import.

        Custom code on the Hub carries the model alone, so without the package this only says what to install.

        Args:
            int8: Unused here.

        Raises:
            ImportError: Always: the package gdino-hf was not imported before this class was loaded.
        """
        raise ImportError(
            f"{type(self).__module__}.{type(self).__name__} was loaded without gdino-hf, which holds "
            "optimize_for_inference(): pip install gdino-hf, then `import gdino_hf` before from_pretrained()."
        )

    def train(self, mode: bool = True) -> Any:
        """As in torch; a model optimized for inference refuses.

        Raises:
            ValueError: The model was optimized for inference.
        """
        if mode and self._optimized:
            raise ValueError("train() on a model optimized for inference: load it again with from_pretrained to train.")
        return super().train(mode)
