"""Tensors among other values, told apart without importing torch: code that reads pictures also runs without it."""

import sys
from os import PathLike
from typing import Any

import numpy as np
from PIL import Image


def is_tensor(value: Any) -> bool:
    """Return whether a value is a torch tensor; without torch there are none."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def as_array(tensor: Any) -> np.ndarray:
    """Return a tensor's values as an array on the CPU, those of any floating dtype as float32."""
    tensor = tensor.detach().cpu()
    array: np.ndarray = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array


def is_picture(value: Any) -> bool:
    """Return whether a value is one picture, by its type alone."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "OSU":
        # An array of paths or of pictures.
        return False
    if isinstance(value, np.ndarray) or is_tensor(value):
        return bool(value.ndim < 4)
    return isinstance(value, (str, PathLike, bytes, bytearray, memoryview, Image.Image)) or hasattr(value, "read")
