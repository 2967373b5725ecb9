"""Cache of text features, so that many images with few prompts run the text encoder once per prompt."""

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from ..model.outputs_gdino import GDinoTextFeatures
from .packed_linear import state_of


class PromptCache:
    """Text features of the most recently used prompts; safe to share between threads.

    Args:
        size: Number of prompts to keep.
    """

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._kept: OrderedDict[tuple, GDinoTextFeatures] = OrderedDict()
        self._lock = threading.Lock()  # a server may run one model in several threads

    def get(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> GDinoTextFeatures:
        """Return the features of a prompt; compute them if the prompt is new or the text weights have changed.

        Args:
            model: The GDinoModel that computes missing features.
            input_ids: (R, T) tokens of the prompts.
            attention_mask: (R, T), nonzero on real tokens.
            token_type_ids: (R, T) token types, or None for zeros.

        Returns:
            The features, shared with later calls: do not write to them.
        """
        texts = (input_ids, attention_mask, token_type_ids)
        shapes = tuple(None if x is None else x.shape for x in texts)
        # Joined, because on a GPU each copy to the host waits until all queued work is done.
        numbers = torch.cat([x.flatten() for x in (input_ids, attention_mask.bool(), token_type_ids) if x is not None])
        prompt = shapes, tuple(numbers.tolist())
        weights = (*model.text_backbone.parameters(), *model.text_projection.parameters())
        key = (prompt, input_ids.device, torch.is_inference_mode_enabled(), state_of(*weights))
        with self._lock:
            features = self._kept.pop(key, None)
        if features is None:
            features = model._text_features(*texts)
        with self._lock:
            self._kept[key] = features
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)
        return features

    def __deepcopy__(self, memo: dict) -> "PromptCache":
        return PromptCache(self.size)

    def __reduce__(self) -> tuple:
        return PromptCache, (self.size,)
