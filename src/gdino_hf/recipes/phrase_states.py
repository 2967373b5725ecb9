"""Text encoder states of the phrases seen in training, which stay the same while the text encoder is frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model.outputs_gdino import GDinoTextFeatures
from ..model.phrase_structure import PhraseStructure, phrase_structure

Block = tuple[int, ...]


class PhraseStates:
    """Text features of a training batch from states that are computed once per phrase; the projection is trained.

    A phrase attends to nothing outside itself and counts its positions from 0, so its states do not depend on the
    prompt around it. Assign an object of this class to `model.model.text_feature_cache`, for training with the text
    encoder frozen only: later changes of its weights go unnoticed.

    Attributes:
        encoded: Number of prompts that the text encoder has processed.
    """

    def __init__(self) -> None:
        self._states: dict[Block, Tensor] = {}
        self.encoded = 0

    def get(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> GDinoTextFeatures:
        """Return the features of prompts, running the text encoder on prompts with a phrase that is new.

        Args:
            model: The GDinoModel.
            input_ids: (R, T) tokens of the prompts.
            attention_mask: (R, T), nonzero on real tokens.
            token_type_ids: (R, T) token types, or None for zeros.

        Returns:
            The features, with a gradient for the text projection.
        """
        phrases = phrase_structure(input_ids, attention_mask, model.config.special_token_ids)
        blocks = _blocks(input_ids, attention_mask, phrases)
        new = [row for row, own in enumerate(blocks) if any(block not in self._states for block in own)]
        if new:
            self._encode(
                model, input_ids[new], attention_mask[new], None if token_type_ids is None else token_type_ids[new],
                [blocks[row] for row in new],
            )  # fmt: skip
        hidden = torch.stack([torch.cat([self._states[block] for block in own]) for own in blocks])
        return GDinoTextFeatures(
            last_hidden_state=model.text_projection(hidden),
            input_ids=input_ids,
            attention_mask=attention_mask.bool(),
            phrase_ids=phrases.phrase_ids,
            phrase_mask=phrases.phrase_mask,
            position_ids=phrases.position_ids,
        )

    @torch.no_grad()
    def _encode(self, model: Any, ids: Tensor, mask: Tensor, types: Tensor | None, blocks: list[list[Block]]) -> None:
        states = model._text_features(ids, mask, types, {"output_hidden_states": True}).hidden_states[-1]
        self.encoded += len(ids)
        for row, own in zip(states, blocks, strict=True):
            place = 0
            for block in own:
                length = len(block) - 1
                # Cloned, because a slice would keep the whole batch in memory.
                self._states.setdefault(block, row[place : place + length].clone())
                place += length


def _blocks(input_ids: Tensor, attention_mask: Tensor, phrases: PhraseStructure) -> list[list[Block]]:
    """Return the blocks of each prompt: whether their tokens are real, then their ids."""
    found = []
    for ids, real, positions in zip(
        input_ids.tolist(), attention_mask.bool().tolist(), phrases.position_ids.tolist(), strict=True
    ):
        starts = [place for place, position in enumerate(positions) if position == 0]
        ends = [*starts[1:], len(ids)]
        found.append([(int(real[start]), *ids[start:end]) for start, end in zip(starts, ends, strict=True)])
    return found
