"""Layouts of pixels: where the channels of a given array are, and the form in which results are returned."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CHANNEL_AXES = ("channels_first", "channels_last")


def channel_axis(value: Any, name: str, others: Sequence[str] = ()) -> str | None:
    """Return where the channel axis is.

    Args:
        value: "channels_first", "channels_last", one of `others`, or transformers' `ChannelDimension`; None if unknown.
        name: Name of the option, for the message.
        others: Further values that the option takes.

    Returns:
        The value as text.

    Raises:
        ValueError: It is none of these.
    """
    if value is None:
        return None
    text = str(getattr(value, "value", value))
    if text not in (*_CHANNEL_AXES, *others):
        raise ValueError(f"{name} must be {', '.join(map(repr, (*_CHANNEL_AXES, *others)))}, got {value!r}.")
    return text


def with_channels_last(image: Any, axis: str | None, *, any_number: bool = False) -> Any:
    """Return an array or tensor as (H, W, C) if its channel axis is known; pictures of other types stay as they are.

    Args:
        image: A picture as for `GDinoImageProcessor.preprocess`.
        axis: "channels_first", "channels_last", "none" for an array (H, W), or None to find the axis by its length.
        any_number: Whether there may be other numbers of channels than 1, 3 and 4.

    Returns:
        The picture.

    Raises:
        ValueError: The array has another number of axes than the layout says.
    """
    if axis is None or not isinstance(image, (np.ndarray, Tensor)):
        return image
    axes = 2 if axis == "none" else 3
    if image.ndim != axes:
        raise ValueError(
            f"input_data_format is {axis!r} but an image has the shape {tuple(image.shape)}; give {axes} axes, or "
            "leave input_data_format out."
        )
    channels = {"channels_first": 0, "channels_last": 2}.get(axis)
    if channels is not None and image.shape[channels] not in (1, 3, 4) and not any_number:
        raise ValueError(
            f"input_data_format {axis!r} puts {image.shape[channels]} channels into an image of the shape "
            f"{tuple(image.shape)}; an image has 1, 3 or 4."
        )
    if axis == "channels_first":
        return image.permute(1, 2, 0) if isinstance(image, Tensor) else image.transpose(1, 2, 0)
    return image


def tensor_type(value: Any) -> str | None:
    """Return the option return_tensors as "pt", "np" or None.

    Args:
        value: One of these, or transformers' `TensorType`.

    Returns:
        The value as text, or None.

    Raises:
        ValueError: It is none of these.
    """
    text = getattr(value, "value", value)
    if text not in (None, "pt", "np"):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {value!r}; torch and numpy are supported.")
    return text


def converted(value: Any, kind: str | None) -> Any:
    """Return the tensors of a result as torch tensors, numpy arrays, or plain lists with one element per row.

    Args:
        value: A tensor, or a list or mapping of values like it.
        kind: "pt", "np" or None. Pictures and masks become numpy arrays in the list, everything else lists of numbers.

    Returns:
        The value in the form asked for.
    """
    if kind == "pt":
        return value
    if isinstance(value, dict):
        return {name: converted(item, kind) for name, item in value.items()}
    if isinstance(value, list):
        # Pictures of several sizes are listed already.
        return [item.numpy() if isinstance(item, Tensor) else converted(item, kind) for item in value]
    if not isinstance(value, Tensor):
        return value
    if kind == "np":
        return value.numpy()
    return list(value.numpy()) if value.ndim > 2 else value.tolist()


def moved(value: Any, device: torch.device | str | int | None) -> Any:
    """Return the tensors of a result on a device.

    Args:
        value: A tensor, or a list or mapping of values like it.
        device: The device; None leaves the value as it is.

    Returns:
        The value, with lists and dicts made anew.
    """
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: moved(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [moved(item, device) for item in value]
    return value


def checked_device(device: Any, kind: str | None) -> torch.device | None:
    """Return the device that results are moved to.

    Args:
        device: Device or its name; None for no move.
        kind: Kind of the results: "pt", "np" or None.

    Returns:
        The device, or None.

    Raises:
        ValueError: There is no such device, or the results are not torch tensors.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is not a device of torch; give for instance 'cpu' or 'cuda'.") from error
    try:
        torch.empty(0, device=found)
    # A build of torch without the device raises an AssertionError.
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"device {device!r} cannot be used on this machine ({why}); give 'cpu'.") from error
    if kind != "pt" and found.type != "cpu":
        raise ValueError(f"device {device!r} needs return_tensors='pt', got {kind!r}; arrays and lists are on the CPU.")
    return found
