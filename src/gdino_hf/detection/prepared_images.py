"""Pictures as inputs of a model: prepared one by one beside the model, then joined to a batch on its device."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..inference.workers import only_blocks


def prepare_image(processor: Any, image: Any, device: Any) -> Any:
    """Turn one picture into a model's image inputs, in the thread that calls it alone.

    Args:
        processor: The model's processor.
        image: The picture, as the processor takes it.
        device: Device of the model. For a CUDA device the inputs are pinned in memory, from where they are copied while
            the device computes.

    Returns:
        The processor's output for the picture, on the CPU.

    Raises:
        ValueError: The processor refuses the picture.
    """
    # The operations are small: split over threads, they would disturb the model and gain nothing.
    with only_blocks():
        inputs = processor(images=image)
    if torch.device(device).type == "cuda":
        inputs.data = {name: value.pin_memory() for name, value in inputs.data.items()}
    return inputs


def join_images(prepared: Sequence[Any], device: Any) -> Any:
    """Join prepared pictures to one batch, as the processor joins a list of pictures.

    Args:
        prepared: What `prepare_image` returned for each picture, one or more.
        device: Device of the model.

    Returns:
        pixel_values (B, 3, H, W), pixel_mask (B, H, W) and image_sizes (B, 2) on the device, with the attribute
        `original_sizes`. Smaller pictures are padded to the largest at the right and at the bottom.
    """
    joined = type(prepared[0])()
    height, width = (max(item["pixel_values"].shape[axis] for item in prepared) for axis in (2, 3))
    for name in prepared[0]:
        parts = [item[name].to(device, non_blocking=True) for item in prepared]
        if name != "image_sizes":
            parts = [F.pad(part, (0, width - part.shape[-1], 0, height - part.shape[-2])) for part in parts]
        joined.data[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    joined.original_sizes = [size for item in prepared for size in item.original_sizes]
    return joined
