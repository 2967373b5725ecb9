"""Upper limits of the sizes in a configuration, so that a damaged or hostile config.json cannot fill the memory.

They are far above every published model. A model whose sizes stay below them is built in seconds; whether the weights
fit it is checked afterwards, in weight_files.py.
"""

from collections.abc import Iterator, Mapping
from typing import Any

MOST_LAYERS = 200
"""Most layers of one part of the model: transformer layers, or all blocks of a backbone together."""
MOST_LEVELS = 32
"""Most feature levels, stages of a backbone, or feature maps."""
MOST_LABELS = 100_000
"""Most entries of id2label, which transformers writes out for a given num_labels and copies many times."""
LONGEST_PROMPT = 2**16
"""Most tokens of a prompt; every output has this many columns for each query."""
SHORTEST_PROMPT = 4
"""Fewest tokens of a prompt: [CLS], one token, a period and [SEP]."""
MOST_QUERIES = 10_000
"""Most queries of the decoder; its attention takes time and memory for every pair of them."""
LARGEST_SIZE = 2**24
"""Largest width, vocabulary, number of positions, and any other number of a configuration."""

_LAYERS = ("layers", "layer", "depth", "depths", "blocks", "repeats", "stage_repeats")
_LEVELS = ("levels", "stages", "maps")
# Numbers that no tensor has as its size.
_FREE = ("seed", "id", "ids", "index", "idx", "theta", "base", "temperature", "factor")


def check_sizes(fields: Mapping[str, Any]) -> None:
    """Check all numbers of a configuration and the configurations inside it.

    Args:
        fields: A configuration as in config.json.

    Raises:
        ValueError: A number is above its limit; the message names the field, the number and the limit.
    """
    for name, value in _numbers(fields, ""):
        limit = _limit(name)
        if value > limit:
            raise ValueError(f"{name} must be at most {limit:,}, got {value:,}.")


def _numbers(value: Any, name: str) -> Iterator[tuple[str, int]]:
    """Yield every integer of a nested configuration with its name; lists of layers count as one sum."""
    if isinstance(value, Mapping):
        if name.rpartition(".")[2] in ("id2label", "label2id"):
            yield f"len({name})", len(value)
            return
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        if _is(name, _LAYERS) and all(isinstance(item, int) for item in value):
            yield name, sum(value)
        if _is(name, _LAYERS) and len(value) > MOST_LEVELS:
            yield f"len({name})", len(value)
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


def _limit(name: str) -> int:
    """Return the limit of a field."""
    last = name.rpartition(".")[2]
    if last in ("num_labels", "id2label)", "label2id)") or name in ("len(id2label)", "len(label2id)"):
        return MOST_LABELS
    if last == "max_text_len":
        return LONGEST_PROMPT
    if last == "num_queries":
        return MOST_QUERIES
    if name.startswith("len(") or _is(name, _LEVELS):
        return MOST_LEVELS
    if _is(name, _LAYERS):
        return MOST_LAYERS
    return 2**63 - 1 if _is(name, _FREE) else LARGEST_SIZE


def _is(name: str, kinds: tuple[str, ...]) -> bool:
    """Whether the last word of a field's name is one of some kinds."""
    return name.rpartition(".")[2].rpartition("_")[2] in kinds
