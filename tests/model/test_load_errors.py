"""Claims about what loading raises: faults of the caller are not blamed on the folder."""

from __future__ import annotations

import pytest
import torch

from gdino_hf import GDinoForObjectDetection


def test_loading_on_the_meta_device_raises_what_transformers_raises(tiny_folder):
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta device context manager"):
        GDinoForObjectDetection.from_pretrained(tiny_folder)
