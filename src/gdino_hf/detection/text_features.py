"""Text features of prompts, each computed once for a model and kept by the prompt's tokens."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..inference.workers import only_blocks, run_blocks
from ..model.outputs_gdino import GDinoTextFeatures
from ..model.phrase_structure import phrase_structure

KEPT_TOKENS = 131_072
"""Tokens whose features a detector keeps beside those of its largest vocabulary: 128 MB in float32 at width 256."""

_AT_ONCE = 8
_NARROWER = (torch.bfloat16, torch.float16)

Tokens = tuple[int, ...]


class TextFeatureStore:
    """The text features of one model's prompts, the least recently used removed first; safe to share between threads.

    Args:
        model: A `GDinoForObjectDetection`.
        size: Number of tokens whose features are kept, unless `make_room` asked for more.
    """

    def __init__(self, model: Any, size: int = KEPT_TOKENS) -> None:
        self._model, self._size = model, size
        self._kept: OrderedDict[Tokens, Tensor] = OrderedDict()
        self._num_tokens = 0
        self._lock = threading.Lock()
        self._fingerprints: tuple[str, ...] = ()
        self.encoded = 0
        """Number of prompts that the text encoder has run for so far."""

    @property
    def fingerprint(self) -> str:
        """Identifies the text encoder: equal for models that compute the same text features."""
        return self.fingerprints[0]

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """The model's own fingerprint, and those that it has when it is loaded in narrower dtypes."""
        if not self._fingerprints:
            self._fingerprints = text_fingerprints(self._model)
        return self._fingerprints

    def make_room(self, prompts: Sequence[Tokens]) -> None:
        """Keep all of these prompts from now on, however many they are: every picture needs all of its vocabulary.

        Args:
            prompts: Tokens of each prompt of a vocabulary.
        """
        with self._lock:
            self._size = max(self._size, sum(map(len, prompts)))

    def get(self, prompts: Sequence[Tokens], given: Mapping[Tokens, Tensor] | None = None) -> list[Tensor]:
        """Return the features of prompts.

        Args:
            prompts: Tokens of each prompt.
            given: Features that were computed before, by tokens.

        Returns:
            (T, D) features of each prompt's tokens on the model's device, shared with later calls: do not write to
            them.
        """
        given = given or {}
        with self._lock:
            found = {tokens: self._kept[tokens] for tokens in prompts if tokens in self._kept}
        brought = [tokens for tokens in prompts if tokens in given and tokens not in found]
        if brought:
            dtype = self._model.base_model.level_embed.dtype
            found |= {tokens: given[tokens].to(self._model.device, dtype) for tokens in brought}
        missing = [tokens for tokens in dict.fromkeys(prompts) if tokens not in found]
        found |= self._encode_all(missing)
        with self._lock:
            for tokens in prompts:
                self._num_tokens += len(tokens) if tokens not in self._kept else 0
                self._kept[tokens] = found[tokens]
                self._kept.move_to_end(tokens)
            while self._num_tokens > self._size:
                oldest, _ = self._kept.popitem(last=False)
                self._num_tokens -= len(oldest)
        return [found[tokens] for tokens in prompts]

    def forget(self) -> None:
        """Remove everything; needed if the model's weights were changed."""
        with self._lock:
            self._kept.clear()
            self._num_tokens = 0
        self._fingerprints = ()

    def stacked(self, prompts: Sequence[Tokens], given: Mapping[Tokens, Tensor] | None = None) -> GDinoTextFeatures:
        """Return the features of prompts as one batch, which forward takes instead of input_ids.

        Args:
            prompts: Tokens of each prompt.
            given: Features that were computed before, by tokens.
        """
        hidden = torch.nn.utils.rnn.pad_sequence(self.get(prompts, given), batch_first=True)
        ids, mask = _padded(prompts, hidden.device)
        phrases = phrase_structure(ids, mask, self._model.config.special_token_ids)
        return GDinoTextFeatures(
            last_hidden_state=hidden,
            input_ids=ids,
            attention_mask=mask,
            phrase_ids=phrases.phrase_ids,
            phrase_mask=phrases.phrase_mask,
            position_ids=phrases.position_ids,
        )

    def _encode_all(self, prompts: list[Tokens]) -> dict[Tokens, Tensor]:
        groups = [prompts[start : start + _AT_ONCE] for start in range(0, len(prompts), _AT_ONCE)]
        found: dict[Tokens, Tensor] = {}
        if self._model._optimized and self._model.device.type == "cpu":
            # Each group is computed by one thread, so the features do not depend on the number of threads.
            with only_blocks():
                run_blocks(lambda place: found.update(self._encode(groups[place])), len(groups))
        else:
            for group in groups:
                found |= self._encode(group)
        self.encoded += len(prompts)
        return found

    def _encode(self, prompts: list[Tokens]) -> dict[Tokens, Tensor]:
        ids, mask = _padded(prompts, self._model.device)
        # The tensors are kept, and an inference tensor could not be used outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            hidden = self._model.get_text_features(ids.clone(), mask.clone()).last_hidden_state
        # Cloned, because a slice would keep the whole batch in memory.
        return {tokens: row[: len(tokens)].clone() for tokens, row in zip(prompts, hidden, strict=True)}


def text_fingerprints(model: Any) -> tuple[str, ...]:
    """Return hashes of everything that text features depend on: settings, and the text encoder's weights.

    Args:
        model: A `GDinoForObjectDetection` or `GDinoModel`.

    Returns:
        64 hexadecimal digits for the weights as they are, whatever dtype holds them; then, for weights that need
        float32, those that they have after loading in bfloat16 and float16. Reading a BERT base takes about a second.
    """
    core = model.base_model
    weights = {
        f"{place} {name}": value.detach().cpu()
        for place, part in enumerate((core.text_backbone, core.text_projection))
        for name, value in sorted(part.state_dict().items())
    }
    dtypes = (*_NARROWER, torch.float32, torch.float64)
    own = next(dtype for dtype in dtypes if all(_holds(dtype, value) for value in weights.values()))
    found = []
    for dtype in (own, *(_NARROWER if own == torch.float32 else ())):
        digest = hashlib.sha256(repr((core.config.special_token_ids, str(dtype))).encode())
        for name, value in weights.items():
            rounded = value.to(dtype) if value.is_floating_point() else value
            digest.update(f"{name} {tuple(value.shape)} {rounded.dtype}".encode())
            digest.update(rounded.contiguous().flatten().view(torch.uint8).numpy())
        found.append(digest.hexdigest())
    return tuple(found)


def _holds(dtype: torch.dtype, value: Tensor) -> bool:
    """Return whether a dtype holds every number of a tensor exactly."""
    return not value.is_floating_point() or torch.equal(value.to(dtype).to(torch.float64), value.to(torch.float64))


def _padded(prompts: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tokens of prompts and the mask of real ones, both (R, T)."""
    rows = [torch.tensor(tokens, dtype=torch.int64) for tokens in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)
