"""Grouping of a prompt's tokens into phrases: which tokens attend to each other, and each token's position."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PhraseStructure:
    """How the tokens of a batch of prompts group into phrases.

    Attributes:
        phrase_ids: (B, T) int64 index of the phrase each token belongs to, -1 on special tokens and padding.
        phrase_mask: (B, T, T) bool, True = may attend.
        position_ids: (B, T) int64 position of each token, restarting at 0 in every block.
    """

    phrase_ids: Tensor
    phrase_mask: Tensor
    position_ids: Tensor


def phrase_structure(input_ids: Tensor, attention_mask: Tensor, special_token_ids: Sequence[int]) -> PhraseStructure:
    """Group tokens into phrases; a phrase and the delimiter that closes it form one attention block.

    [CLS], [SEP] and every padding token are blocks of their own. A last phrase without a delimiter is one block too,
    however much padding follows.

    Args:
        input_ids: (B, T) token ids.
        attention_mask: (B, T), nonzero on real tokens.
        special_token_ids: Ids of [CLS], [SEP] and the delimiters, in this order.

    Returns:
        The phrases of every prompt.
    """
    real = attention_mask.bool()
    special = torch.zeros_like(real)
    for token in special_token_ids:
        special = special | (input_ids == token)
    alone = (input_ids == special_token_ids[0]) | (input_ids == special_token_ids[1]) | ~real
    ends = special | ~real
    after_end = torch.nn.functional.pad(ends[:, :-1], (1, 0), value=True)
    # A block begins after every special token, and at [CLS], [SEP] and padding, which form blocks of one token.
    begins = after_end | alone
    block = begins.cumsum(dim=-1)
    place = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    # Unpacked, because transformers' exporters replace cummax by a function that returns a plain tuple.
    start, _ = torch.where(begins, place, torch.zeros_like(place)).cummax(dim=-1)
    word = real & ~special
    first_word = word & torch.nn.functional.pad(~word[:, :-1], (1, 0), value=True)
    ordinal = first_word.cumsum(dim=-1) - 1
    return PhraseStructure(
        phrase_ids=torch.where(word, ordinal, torch.full_like(ordinal, -1)),
        phrase_mask=block[:, :, None] == block[:, None, :],
        position_ids=place - start,
    )
