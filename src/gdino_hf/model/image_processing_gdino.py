"""The image processor: photographs to pixel tensors with PIL and numpy, and COCO boxes to training labels."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import get_size_with_aspect_ratio

from .box_ops import cxcywh_to_xyxy
from .picture_pixels import in_unit_range, load_image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Options of other image processors that have no effect here: the channel axis is detected, and PIL runs on the CPU.
_WITHOUT_EFFECT = frozenset(
    {
        *("data_format", "input_data_format", "device", "disable_grouping", "default_to_square", "do_convert_rgb"),
        *("do_convert_annotations", "format"),
    }
)


class GDinoImageProcessor(BaseImageProcessor):
    """Resize, normalize and pad photographs.

    Args:
        do_resize: Whether to resize.
        size: {"shortest_edge", "longest_edge"} keeps the aspect ratio; {"height", "width"} does not.
        resample: Number of PIL's resampling filter; 2 is bilinear.
        do_rescale: Whether to multiply by rescale_factor. If not, bytes stay in 0..255 and floats in 0..1 stay there.
        rescale_factor: Factor from bytes to the model's range; 1 / 255 gives 0..1.
        do_normalize: Whether to subtract image_mean and divide by image_std.
        image_mean: Mean of each channel, after rescaling.
        image_std: Standard deviation of each channel, after rescaling.
        do_pad: Whether to pad the images of a batch to one size.
        pad_size: {"height", "width"} to pad to; None pads to the largest image.
    """

    model_input_names = ["pixel_values", "pixel_mask"]

    def __init__(
        self,
        do_resize: bool = True,
        size: dict[str, int] | None = None,
        resample: int = 2,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        do_pad: bool = True,
        pad_size: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("image_processor_type", None)
        super().__init__(**kwargs)
        self.do_resize = do_resize
        self.size = _checked_size(size if size is not None else {"shortest_edge": 800, "longest_edge": 1333})
        self.resample = int(resample)
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.do_pad = do_pad
        self.pad_size = pad_size

    def preprocess(
        self,
        images: Any,
        annotations: Any = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare one image or several.

        Args:
            images: PIL image, numpy array or torch tensor ((H, W), (H, W, C) or (C, H, W); bytes, or floats in 0..1),
                path, bytes, or a list of these.
            annotations: COCO annotations of one image or a list of them, each {"annotations": [{"bbox": xywh in pixels,
                "category_id": int}, ...]}; see `boxes_from_coco`.
            return_tensors: "pt" or None; both give torch tensors.
            **kwargs: Constructor arguments to override for this call.

        Returns:
            "pixel_values" (B, 3, H, W) float32, "pixel_mask" (B, H, W) int64 with 1 on real pixels, and "labels" if
            there are annotations. The attribute `image_sizes` has each image's (height, width) before padding,
            `original_sizes` that of the upright photograph.

        Raises:
            TypeError: An option is unknown.
            ValueError: An image cannot be read or has values that are not finite.
        """
        check_options(kwargs)
        if return_tensors not in (None, "pt"):
            raise ValueError(
                f"return_tensors must be 'pt', got {return_tensors!r}; this processor makes torch tensors."
            )
        options = {**vars(self), **{name: value for name, value in kwargs.items() if value is not None}}
        if kwargs.get("size") is not None:
            options["size"] = _checked_size(kwargs["size"])
        images = as_list(images)
        if not images:
            raise ValueError("The list of images is empty; give at least one.")
        pictures = [load_image(image) for image in images]
        arrays = [
            _prepare(picture, options, unit=in_unit_range(image))
            for image, picture in zip(images, pictures, strict=True)
        ]
        sizes = [(array.shape[1], array.shape[2]) for array in arrays]
        height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
        if options["pad_size"] is not None:
            pad = options["pad_size"]
            if pad["height"] < height or pad["width"] < width:
                raise ValueError(f"pad_size {pad} is smaller than an image of {height}x{width}; enlarge it or size.")
            height, width = pad["height"], pad["width"]
        elif not options["do_pad"] and len(set(sizes)) > 1:
            raise ValueError(f"Images of sizes {sorted(set(sizes))} do not stack; set do_pad=True.")
        pixel_values = torch.zeros(len(arrays), 3, height, width)
        pixel_mask = torch.zeros(len(arrays), height, width, dtype=torch.int64)
        for index, array in enumerate(arrays):
            pixel_values[index, :, : array.shape[1], : array.shape[2]] = torch.from_numpy(array)
            pixel_mask[index, : array.shape[1], : array.shape[2]] = 1
        data: dict[str, Any] = {"pixel_values": pixel_values, "pixel_mask": pixel_mask}
        original_sizes = [(picture.height, picture.width) for picture in pictures]
        if annotations is not None:
            annotations = [annotations] if isinstance(annotations, dict) else list(annotations)
            if len(annotations) != len(pictures):
                raise ValueError(f"There are {len(annotations)} annotations for {len(pictures)} images; give one each.")
            data["labels"] = [
                boxes_from_coco(annotation, size) for annotation, size in zip(annotations, original_sizes, strict=True)
            ]
        features = BatchFeature(data)
        features.image_sizes = sizes
        features.original_sizes = original_sizes
        return features

    @staticmethod
    def boxes_from_coco(annotation: dict[str, Any], image_size: tuple[int, int]) -> dict[str, Tensor]:
        """Convert COCO annotations of one image to labels; see the module's function `boxes_from_coco`."""
        return boxes_from_coco(annotation, image_size)

    def post_process_object_detection(
        self, outputs: Any, threshold: float = 0.1, target_sizes: Tensor | Sequence[tuple[int, int]] | None = None
    ) -> list[dict[str, Tensor]]:
        """Turn outputs into boxes scored by their best token; `GDinoProcessor` has the version that returns labels.

        Args:
            outputs: Model output with logits (B, Q, T) and pred_boxes (B, Q, 4).
            threshold: Score that boxes must exceed, 0..1.
            target_sizes: (height, width) of each image in pixels; None leaves boxes in 0..1.

        Returns:
            For each image "scores" (N,), "labels" (N,) index of the best token, and "boxes" (N, 4) xyxy.
        """
        scores, tokens = outputs.logits.float().sigmoid().max(-1)
        boxes = cxcywh_to_xyxy(outputs.pred_boxes.float())
        if target_sizes is not None:
            boxes = boxes * box_scale(target_sizes, boxes)[:, None]
        return [
            {"scores": s[s > threshold], "labels": t[s > threshold], "boxes": b[s > threshold]}
            for s, t, b in zip(scores, tokens, boxes, strict=True)
        ]


def check_options(names: Iterable[str]) -> None:
    """Raise if an option is unknown and would have no effect.

    Args:
        names: Names of options for one call of the image processor.

    Raises:
        TypeError: An option is unknown.
    """
    known = set(inspect.signature(GDinoImageProcessor.__init__).parameters) - {"self", "kwargs"}
    unknown = sorted(set(names) - known - _WITHOUT_EFFECT)
    if unknown:
        raise TypeError(f"There is no option {unknown[0]!r}; the options of images are {', '.join(sorted(known))}.")


def boxes_from_coco(annotation: dict[str, Any], image_size: tuple[int, int]) -> dict[str, Tensor]:
    """Convert COCO annotations of one image to the model's labels, leaving out crowds and boxes without area.

    Args:
        annotation: {"annotations": [{"bbox": absolute xywh in pixels, "category_id": int, "iscrowd"?}, ...]}.
        image_size: (height, width) of the photograph in pixels.

    Returns:
        "class_labels" (N,) int64 category ids, and "boxes" (N, 4) float32 cxcywh in [0, 1], clipped to the image.

    Raises:
        ValueError: The list "annotations" is missing, or an entry lacks a class or a box of four finite numbers.
    """
    if not isinstance(annotation, dict) or "annotations" not in annotation:
        raise ValueError("An annotation must be a dict with the list 'annotations', as COCO has it.")
    kept = [item for item in annotation["annotations"] if not item.get("iscrowd", 0)]
    boxes, classes = [], []
    height, width = image_size
    for item in kept:
        if item.get("bbox") is None:
            raise ValueError(f"The annotation {dict(item)} has no bbox; give x, y, width, height.")
        box = np.asarray(item["bbox"], dtype=np.float64)
        if box.shape != (4,) or not np.isfinite(box).all():
            raise ValueError(f"The bbox {item['bbox']} is not four finite numbers x, y, width, height; repair it.")
        if box[2] < 0 or box[3] < 0:
            raise ValueError(f"The bbox {item['bbox']} has a negative width or height; give x, y, width, height.")
        left, top = box[0].clip(0, width), box[1].clip(0, height)
        right, bottom = (box[0] + box[2]).clip(0, width), (box[1] + box[3]).clip(0, height)
        if right > left and bottom > top:
            boxes.append(
                [
                    (left + right) / 2 / width,
                    (top + bottom) / 2 / height,
                    (right - left) / width,
                    (bottom - top) / height,
                ]
            )
            classes.append(category_id(item))
    return {
        "class_labels": torch.tensor(classes, dtype=torch.int64),
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
    }


def category_id(item: Mapping[str, Any]) -> int:
    """Return the category id of one annotation.

    Args:
        item: A dict with "category_id".

    Returns:
        The id.

    Raises:
        ValueError: It is missing or not a whole number.
    """
    number = item.get("category_id")
    if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
        raise ValueError(f"The category_id {number!r} is not a whole number; give the id of the annotation's class.")
    return int(number)


def box_scale(target_sizes: Tensor | Sequence[tuple[int, int]], boxes: Tensor) -> Tensor:
    """Return the (B, 4) factors that scale xyxy boxes from 0..1 to pixels.

    Args:
        target_sizes: (height, width) of each image in pixels.
        boxes: Boxes (B, Q, 4), which give the device and the number of images.

    Returns:
        (width, height, width, height) of each image.

    Raises:
        ValueError: The number of sizes is not the number of images.
    """
    if not isinstance(target_sizes, Tensor):
        target_sizes = torch.stack([torch.as_tensor(size, dtype=torch.float32).cpu() for size in target_sizes])
    sizes = target_sizes.to(boxes.device, torch.float32).reshape(-1, 2)
    if sizes.shape[0] != boxes.shape[0]:
        raise ValueError(f"There are {sizes.shape[0]} target_sizes for {boxes.shape[0]} images; give one each.")
    return sizes.flip(-1).repeat(1, 2)


def as_list(images: Any) -> list[Any]:
    """Return one image or several as a list; a 4-D array or tensor is a batch."""
    if isinstance(images, (list, tuple)):
        return list(images)
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def _checked_size(size: Any) -> dict[str, int]:
    if not isinstance(size, Mapping):
        raise TypeError(
            f"size must be a dict such as {{'shortest_edge': 800, 'longest_edge': 1333}}, got {size!r}; name the edges."
        )
    size = {name: int(value) for name, value in size.items() if value is not None}
    known = ({"shortest_edge", "longest_edge"}, {"shortest_edge"}, {"height", "width"}, {"max_height", "max_width"})
    if set(size) not in known or min(size.values()) < 1:
        raise ValueError(
            f"size must be positive shortest_edge and longest_edge, or height and width, got {size or 'nothing'}."
        )
    return size


def _prepare(picture: Image.Image, options: dict[str, Any], unit: bool) -> np.ndarray:
    """Turn one RGB picture into a (3, H, W) float32 array; `unit` says its pixels were given in 0..1."""
    if options["do_resize"]:
        height, width = target_size((picture.height, picture.width), options["size"])
        if (width, height) != picture.size:
            picture = picture.resize((width, height), resample=options["resample"])
    pixels: np.ndarray = np.asarray(picture, dtype=np.float32)
    if options["do_rescale"]:
        pixels = pixels * np.float32(options["rescale_factor"])
    elif unit:
        pixels = pixels / np.float32(255)
    if options["do_normalize"]:
        mean = np.asarray(options["image_mean"], dtype=np.float32)
        pixels = (pixels - mean) / np.asarray(options["image_std"], dtype=np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def target_size(original: tuple[int, int], size: dict[str, int]) -> tuple[int, int]:
    """Return (height, width) after resizing, at least one pixel each even for a very long and thin picture.

    Args:
        original: (height, width) of the picture in pixels.
        size: Target size as in `GDinoImageProcessor`.
    """
    if "height" in size:
        return size["height"], size["width"]
    if "max_height" in size:
        scale = min(size["max_height"] / original[0], size["max_width"] / original[1])
        return max(1, int(original[0] * scale)), max(1, int(original[1] * scale))
    height, width = original
    longest = size.get("longest_edge")
    if longest is not None and longest * min(original) / max(original) < 0.5:
        return (longest, 1) if height > width else (1, longest)
    new_height, new_width = get_size_with_aspect_ratio((height, width), size["shortest_edge"], longest)
    return max(1, new_height), max(1, new_width)
