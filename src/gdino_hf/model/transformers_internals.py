"""Parts of transformers that model/ uses although transformers does not promise to keep them.

Tried with transformers 5.23. Each function below says what happens when its part changes in a later release; this file
is then the only one to mend. Subclass hooks, which cannot move here because transformers calls them by name
(`_init_weights`, `_load_pretrained_model`, ...), are documented where they are overridden.
"""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig, SwinBackbone
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
