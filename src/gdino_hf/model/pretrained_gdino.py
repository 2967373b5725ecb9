"""What all models of the family share: initialization, and inference laid out for the machine."""

import logging
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .configuration_gdino import GDinoConfig
from .fusion import FusionLayer
from .heads import PRIOR_BIAS, BoxHead, ContrastiveHead
from .inference_gdino import PromptCache, pack_layers, pack_model
from .int8_linear import check_int8, has_int8
from .ms_deform_attn import MSDeformAttn
from .packed_linear import bfloat16_is_slower
from .stored_model import StoredModel

logger = logging.getLogger(__name__)


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
        """Lay the weights out for this machine's CPU, which runs several times faster, and keep what repeats.

        Linear layers run through oneDNN in its own layout, a Swin backbone window by window, and text features of the
        last prompts are kept. Results differ in rounding only. The published weights stay beside their copies (about
        240 MB more for Grounding DINO-T in float32), so `state_dict` and `save_pretrained` give what they gave before.
        Under torch.compile and on other devices the usual operations run.

        With `int8` the layers of image tokens and queries multiply 8-bit numbers, each row scaled by its own largest
        value, and compute everything else in float32, as do the text's layers and those that make boxes and scores.

        Args:
            int8: True asks for it, False forbids it. None uses it for a bfloat16 model on a CPU that multiplies
                float32 faster than bfloat16 and has AVX-512 VNNI. Such a model becomes float32, and is then saved so;
                without VNNI or with False it computes in float32. A log line says which.

        Returns:
            The model itself, in eval mode and without gradients; it does not train any more, and a second call leaves
            it as it is.

        Raises:
            ValueError: `int8` is True and cannot be had: the model is not on a CPU, or not float32 or bfloat16, the CPU
                has no AVX-512 VNNI, or the C library was not compiled.
        """
        if self._optimized:
            return self
        self.eval()
        on_cpu = self.device.type == "cpu"
        if int8:
            check_int8(self.device, self.dtype)
        if on_cpu and self.dtype == torch.bfloat16 and (int8 or bfloat16_is_slower()):
            reason = "As int8 was asked for" if int8 else "This CPU is slow at bfloat16"
            int8 = has_int8() if int8 is None else int8
            now = "multiplies 8-bit numbers for image tokens and queries, everything else" if int8 else "computes"
            logger.warning("%s: the model now %s in float32.", reason, now)
            self.float()
        core = self.base_model
        for module in (self, core):
            module._optimized = True
            module.requires_grad_(False)
        pack_model(core, bool(int8))
        if core is not self:
            pack_layers(self.bbox_embed)
        core._prompts = PromptCache()
        return self

    def train(self, mode: bool = True) -> Any:
        """As in torch; a model optimized for inference refuses.

        Raises:
            ValueError: The model was optimized for inference.
        """
        if mode and self._optimized:
            raise ValueError("train() on a model optimized for inference: load it again with from_pretrained to train.")
        return super().train(mode)
