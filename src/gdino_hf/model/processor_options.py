"""Options of the processor's call: flat or grouped by kind, and those of tokenizers that prompts can follow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.processing_utils import TextKwargs

from .pixel_layouts import tensor_type

_GROUPS = ("common_kwargs", "images_kwargs", "text_kwargs")
_OF_TOKENIZERS = frozenset(TextKwargs.__annotations__) - {"return_tensors"}
_PADDINGS: dict[bool | str, str] = {
    True: "longest",
    False: "do_not_pad",
    "longest": "longest",
    "max_length": "max_length",
    "do_not_pad": "do_not_pad",
}
_TRUNCATIONS = (None, True, False, "longest_first", "only_first", "only_second", "do_not_truncate")
# Values of options of tokenizers that ask for nothing else than a prompt is.
_USUAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (None, True),
    "padding_side": (None, "right"),
    "return_token_type_ids": (None, True, False),
    "return_attention_mask": (None, True, False),
    "stride": (None, 0),
    "verbose": (None, True, False),
}
_REMEDIES = {
    "add_special_tokens": "every prompt begins with [CLS] and ends with [SEP]",
    "padding_side": "prompts are padded on the right",
}


@dataclass(frozen=True)
class PromptLayout:
    """How the tokens of several prompts become one table.

    Attributes:
        padding: "longest", "max_length" or "do_not_pad".
        length: Number of tokens to pad to, if padding is "max_length"; None for the processor's max_text_len.
        multiple: Number of which the padded length is a multiple.
        most: Largest number of tokens, if the caller asked for truncation; longer prompts are refused, not cut.
        token_types: Whether to return token_type_ids.
        mask: Whether to return attention_mask.
    """

    padding: str = "longest"
    length: int | None = None
    multiple: int = 1
    most: int | None = None
    token_types: bool = True
    mask: bool = True

    def padded_length(self, lengths: Sequence[int], max_text_len: int) -> int:
        """Return the number of tokens that prompts are padded to.

        Args:
            lengths: Number of tokens of each prompt.
            max_text_len: Largest number of tokens that the model takes.

        Returns:
            The number of tokens; with "do_not_pad", that of the longest prompt.

        Raises:
            ValueError: A prompt is longer than the options allow, or the model takes fewer tokens than they ask for.
        """
        longest = max(lengths)
        wanted = longest
        if self.padding == "max_length":
            wanted = max_text_len if self.length is None else self.length
        limit = wanted if self.most is None else min(wanted, self.most) if self.padding == "max_length" else self.most
        if longest > limit:
            raise ValueError(
                f"A prompt has {longest} tokens but max_length is {limit}; labels are never cut, so raise max_length, "
                "or give the processor a smaller max_text_len, which spreads labels over several prompts."
            )
        wanted += -wanted % self.multiple
        if wanted > max(max_text_len, longest):
            raise ValueError(
                f"Prompts would be padded to {wanted} tokens but the model takes {max_text_len}; give a smaller "
                "max_length or pad_to_multiple_of."
            )
        return wanted


@dataclass(frozen=True)
class CallOptions:
    """The options of one call of the processor.

    Attributes:
        images: Options of the image processor.
        layout: How prompts become a table of tokens.
        return_tensors: "pt", "np" or None.
    """

    images: dict[str, Any]
    layout: PromptLayout
    return_tensors: str | None


def call_options(given: Mapping[str, Any], tokenizer: Any) -> CallOptions:
    """Sort the options of a call.

    Args:
        given: Options, flat or in the groups images_kwargs, text_kwargs and common_kwargs.
        tokenizer: The tokenizer; padding and max_length that it was made with are the defaults.

    Returns:
        The options by purpose. Names of image options are checked by the image processor.

    Raises:
        TypeError: A group is not a dict, or text_kwargs has an unknown option.
        ValueError: An option is given twice, or asks for something that prompts cannot be.
    """
    groups = {name: _as_dict(name, given.get(name)) for name in _GROUPS}
    flat = {name: value for name, value in given.items() if name not in _GROUPS}
    for group in _GROUPS[1:]:
        for name in groups[group]:
            if name in flat:
                raise ValueError(f"The option {name!r} is given twice, by itself and in {group}; give it once.")
    unknown = sorted(set(groups["text_kwargs"]) - _OF_TOKENIZERS - {"return_tensors"})
    if unknown:
        raise TypeError(
            f"There is no option {unknown[0]!r} of text; text_kwargs takes {', '.join(sorted(_OF_TOKENIZERS))}."
        )
    text = {name: value for name, value in flat.items() if name in _OF_TOKENIZERS} | groups["text_kwargs"]
    images = {name: value for name, value in flat.items() if name not in text} | groups["images_kwargs"]
    kinds = [source["return_tensors"] for source in (images, text) if "return_tensors" in source]
    for name, value in groups["common_kwargs"].items():
        others = kinds if name == "return_tensors" else [source[name] for source in (images, text) if name in source]
        if any(not _equal(value, other) for other in others):
            raise ValueError(f"The option {name!r} is {value!r} in common_kwargs but {others[0]!r} elsewhere.")
        if name == "return_tensors":
            kinds.append(value)
        elif name in _OF_TOKENIZERS:
            text[name] = value
        else:
            images[name] = value
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(f"return_tensors is {kinds[0]!r} in one place and {kinds[1]!r} in another; give one.")
    images.pop("return_tensors", None)
    text.pop("return_tensors", None)
    return CallOptions(images, _layout(text, tokenizer), tensor_type(kinds[0] if kinds else "pt"))


def _as_dict(name: str, group: Any) -> dict[str, Any]:
    if group is not None and not isinstance(group, Mapping):
        raise TypeError(f"{name} must be a dict of options, got {group!r}.")
    return dict(group or {})


def _equal(first: Any, second: Any) -> bool:
    try:
        return bool(first == second)
    except (TypeError, ValueError, RuntimeError):
        # Arrays compare element by element.
        return first is second


def _layout(text: Mapping[str, Any], tokenizer: Any) -> PromptLayout:
    """Return how prompts are padded, from a call's options and those that the tokenizer was made with."""
    for name, value in text.items():
        if name in ("padding", "truncation", "max_length", "pad_to_multiple_of"):
            continue
        # Types must agree, too, because 0 equals False.
        if not any(type(value) is type(usual) and value == usual for usual in _USUAL.get(name, (None, False))):
            why = _REMEDIES.get(name, "prompts are made from labels")
            raise ValueError(f"The option {name}={value!r} cannot be followed, because {why}; leave it out.")
    made_with = getattr(tokenizer, "init_kwargs", {})
    padding = text.get("padding")
    if padding is None:
        padding = "max_length" if made_with.get("padding") == "max_length" else True
    padding = getattr(padding, "value", padding)
    if not isinstance(padding, (bool, str)) or padding not in _PADDINGS:
        raise ValueError(f"padding must be True, False, 'longest', 'max_length' or 'do_not_pad', got {padding!r}.")
    length = text.get("max_length")
    if length is None and _PADDINGS[padding] == "max_length":
        length = made_with.get("max_length")
    for name, value in (("max_length", length), ("pad_to_multiple_of", text.get("pad_to_multiple_of"))):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of tokens from 1, got {value!r}.")
    truncation = getattr(text.get("truncation"), "value", text.get("truncation"))
    if not isinstance(truncation, (bool, str, type(None))) or truncation not in _TRUNCATIONS:
        raise ValueError(
            f"truncation must be True, False, 'longest_first' or 'do_not_truncate', got {truncation!r}; leave it out, "
            "because labels are never cut."
        )
    return PromptLayout(
        padding=_PADDINGS[padding],
        length=length,
        multiple=text.get("pad_to_multiple_of") or 1,
        most=length if truncation not in (None, False, "do_not_truncate") else None,
        token_types=text.get("return_token_type_ids") is not False,
        mask=text.get("return_attention_mask") is not False,
    )
