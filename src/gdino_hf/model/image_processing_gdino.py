"""The image processor: photographs to pixel tensors with PIL and numpy, and COCO boxes to training labels."""

import functools
import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from .box_ops import box_scale, check_outputs, cxcywh_to_xyxy
from .coco_labels import boxes_from_coco, labels_from_coco
from .option_flags import checked_flag
from .picture_files import check_opened
from .picture_metadata import upright
from .picture_pixels import in_unit_range, load_image
from .pixel_layouts import channel_axis, checked_device, converted, moved, tensor_type, with_channels_last
from .pixel_values import height_and_width, prepared
from .remote_pictures import downloaded
from .resize_sizes import DEFAULT_SIZE, checked_pad_size, checked_size
from .tensor_values import as_array, is_tensor

logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Options of a call that the constructor does not name.
_CALL_OPTIONS = frozenset(
    {
        *("input_data_format", "data_format", "device", "do_convert_annotations", "do_convert_rgb", "format"),
        *("max_size", "default_to_square", "pad_and_return_pixel_mask"),
    }
)
# Pictures are not grouped here, so this option has nothing to change.
_WITHOUT_EFFECT = frozenset({"disable_grouping"})
_FLAGS = (
    *("do_resize", "do_rescale", "do_normalize", "do_pad", "do_convert_annotations", "do_convert_rgb"),
    *("default_to_square", "pad_and_return_pixel_mask", "disable_grouping"),
)
# Factors of pixels from 0 to 65535 and back; beyond them, every picture is black, or infinite, to a model.
_SMALLEST, _LARGEST = 1e-6, 1e6


class GDinoImageProcessor(BaseImageProcessor):
    """Resize, normalize and pad photographs.

    Args:
        do_resize: Whether to resize.
        size: {"shortest_edge", "longest_edge"} or one of the two keeps the aspect ratio, as does {"max_height",
            "max_width"}; {"height", "width"} or a pair of numbers does not. A number is the shortest edge, with a
            longest edge of 1333 or `max_size`.
        resample: Number of PIL's resampling filter; 2 is bilinear.
        do_rescale: Whether to multiply by rescale_factor. If not, bytes stay in 0..255 and floats in 0..1 stay there.
        rescale_factor: Factor from bytes to the model's range; 1 / 255 gives 0..1.
        do_normalize: Whether to subtract image_mean and divide by image_std.
        image_mean: Mean of each channel, after rescaling.
        image_std: Standard deviation of each channel, after rescaling.
        do_pad: Whether to pad the images of a batch to one size.
        pad_size: {"height", "width"} to pad to; None pads to the largest image.

    Raises:
        TypeError: size has another type.
        ValueError: size, rescale_factor, image_mean or image_std cannot be used, or an option that is on or off is
            neither True nor False.
    """

    model_input_names = ["pixel_values", "pixel_mask", "image_sizes"]

    def __init__(
        self,
        do_resize: bool = True,
        size: dict[str, int] | int | None = None,
        resample: int = 2,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | Sequence[float] = IMAGENET_MEAN,
        image_std: float | Sequence[float] = IMAGENET_STD,
        do_pad: bool = True,
        pad_size: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("image_processor_type", None)
        max_size, pad = kwargs.pop("max_size", None), kwargs.pop("pad_and_return_pixel_mask", None)
        super().__init__(**kwargs)
        self.do_resize = _flag(do_resize, "do_resize")
        self.size = checked_size(size if size is not None else DEFAULT_SIZE, max_size if size is not None else None)
        self.resample = _checked_resample(resample)
        self.do_rescale = _flag(do_rescale, "do_rescale")
        self.rescale_factor = _checked_factor(rescale_factor)
        self.do_normalize = _flag(do_normalize, "do_normalize")
        self.image_mean = _checked_mean(image_mean)
        self.image_std = _checked_std(image_std)
        if len(self.image_mean) != len(self.image_std):
            raise ValueError(
                f"image_mean has {len(self.image_mean)} numbers and image_std {len(self.image_std)}; give each one for "
                "every channel."
            )
        self.do_pad = _flag(do_pad, "do_pad") if pad is None else checked_flag(pad, "pad_and_return_pixel_mask")
        self.pad_size = checked_pad_size(pad_size)

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
                path, http(s) or data address, bytes, or a list of these; lists inside the list are joined.
            annotations: COCO annotations of one image or a list of them, each {"annotations": [{"bbox": xywh in pixels,
                "category_id": int}, ...]}; see `labels_from_coco`.
            return_tensors: "pt" for torch tensors, "np" for numpy arrays, None for lists with one element per image,
                which need no padding to one size.
            **kwargs: Constructor arguments to override for this call, and: `input_data_format`, "channels_first",
                "channels_last" or "none" (no channels), where the axis of a given array cannot be told from its length;
                `data_format`, "channels_first" (the default) or "channels_last", that of pixel_values; `device` of the
                tensors returned; `do_convert_annotations`, False for boxes as xyxy in pixels of the resized picture;
                `do_convert_rgb`, False to keep the channels of arrays and of grey and transparent pictures.

        Returns:
            "pixel_values" (B, 3, H, W) float32, "pixel_mask" (B, H, W) int64 with 1 on real pixels, "image_sizes"
            (B, 2) int64 with each image's (height, width) before padding, and "labels" if there are annotations. The
            attribute `original_sizes` has the (height, width) of the upright photographs.

        Raises:
            TypeError: An option is unknown.
            ValueError: An image cannot be read or has values that are not finite, or an option cannot be used.
        """
        check_options(kwargs)
        kind = tensor_type(return_tensors)
        options = self._options(kwargs)
        device = checked_device(options.get("device"), kind)
        images = as_list(images)
        if not images:
            raise ValueError("The list of images is empty; give at least one.")
        keeps_channels, axis = options.get("do_convert_rgb") is False, options["input_data_format"]
        images = [with_channels_last(downloaded(image), axis, any_number=keeps_channels) for image in images]
        pictures = [_with_own_channels(image) if keeps_channels else load_image(image) for image in images]
        arrays = [
            prepared(picture, options, unit=in_unit_range(image))
            for image, picture in zip(images, pictures, strict=True)
        ]
        original_sizes = [height_and_width(picture) for picture in pictures]
        sizes = [(array.shape[1], array.shape[2]) for array in arrays]
        data = _batch(arrays, options, may_differ=kind is None)
        if annotations is not None:
            annotations = [annotations] if isinstance(annotations, Mapping) else list(annotations)
            if len(annotations) != len(pictures):
                raise ValueError(f"There are {len(annotations)} annotations for {len(pictures)} images; give one each.")
            relative = options.get("do_convert_annotations") is not False
            data["labels"] = [
                labels_from_coco(annotation, size, resized, relative=relative)
                for annotation, size, resized in zip(annotations, original_sizes, sizes, strict=True)
            ]
        features = BatchFeature(converted(moved(data, device), kind))
        features.original_sizes = original_sizes
        return features

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the processor's own options, replaced by those of a call that are not None, in their usual form."""
        options = {**vars(self), **{name: value for name, value in given.items() if value is not None}}
        options |= {name: checked_flag(options[name], name) for name in _FLAGS if options.get(name) is not None}
        if given.get("size") is not None or given.get("max_size") is not None:
            # A longest edge of this call takes the place of the processor's own.
            own = {name: value for name, value in self.size.items() if name != "longest_edge"}
            size = given["size"] if given.get("size") is not None else own
            options["size"] = checked_size(size, given.get("max_size"), square=bool(options.get("default_to_square")))
        if given.get("pad_and_return_pixel_mask") is not None:
            options["do_pad"] = options["pad_and_return_pixel_mask"]
        options["pad_size"] = checked_pad_size(options["pad_size"])
        options["image_mean"] = _checked_mean(options["image_mean"])
        options["image_std"] = _checked_std(options["image_std"])
        options["resample"] = _checked_resample(options["resample"])
        options["rescale_factor"] = _checked_factor(options["rescale_factor"])
        options["input_data_format"] = channel_axis(options.get("input_data_format"), "input_data_format", ("none",))
        options["data_format"] = channel_axis(options.get("data_format"), "data_format")
        form = getattr(options.get("format"), "value", options.get("format"))
        if form not in (None, "coco_detection"):
            raise ValueError(f"format must be 'coco_detection', got {form!r}; panoptic annotations have no boxes.")
        return options

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
        check_outputs(outputs)
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
    unknown = sorted(set(names) - known - _CALL_OPTIONS - _WITHOUT_EFFECT)
    if unknown:
        raise TypeError(
            f"There is no option {unknown[0]!r}; the options of images are {', '.join(sorted(known))}, and those of a "
            f"call {', '.join(sorted(_CALL_OPTIONS))}."
        )


def as_list(images: Any) -> list[Any]:
    """Return one image or several as a flat list; a 4-D array or tensor is a batch, and lists in a list are joined."""
    if isinstance(images, (list, tuple)):
        return [each for item in images for each in as_list(item)]
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def _flag(value: Any, name: str) -> bool:
    """Return an option of the constructor that is on or off; files may hold null for the default, which is on."""
    return value is None or checked_flag(value, name)


def _per_channel(values: float | Sequence[float], name: str) -> list[float]:
    given = [values] * 3 if isinstance(values, (int, float)) else values
    numbers = isinstance(given, (list, tuple, np.ndarray)) and len(given) > 0
    if not numbers or not all(_is_number(x) for x in given):
        raise ValueError(f"{name} is {values!r}; give one finite number for each channel, or one for all.")
    return [float(x) for x in given]


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number; True and False, which Python counts among the integers, are none."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _checked_std(values: float | Sequence[float]) -> list[float]:
    checked = _per_channel(values, "image_std")
    if not all(_SMALLEST <= number <= _LARGEST for number in checked):
        raise ValueError(
            f"image_std is {checked}; pixels are divided by it, give numbers from {_SMALLEST:g} to {_LARGEST:g}."
        )
    return checked


def _checked_mean(values: float | Sequence[float]) -> list[float]:
    checked = _per_channel(values, "image_mean")
    if any(abs(number) > _LARGEST for number in checked):
        raise ValueError(f"image_mean is {checked}; give the mean of the pixels, at most {_LARGEST:g}.")
    return checked


def _checked_resample(value: Any) -> int:
    known = sorted(int(each) for each in Image.Resampling)
    if isinstance(value, bool) or value not in known:
        raise ValueError(f"resample is {value!r}; give one of Pillow's filters {known}, such as 2 for bilinear.")
    return int(value)


def _checked_factor(factor: float) -> float:
    if not _is_number(factor):
        raise ValueError(f"rescale_factor is {factor!r}; give one finite number, such as 1 / 255.")
    if not _SMALLEST <= abs(factor) <= _LARGEST:
        raise ValueError(
            f"rescale_factor is {factor}, with which a model sees nothing; give 1 / 255 for 0..1, or another number "
            f"from {_SMALLEST:g} to {_LARGEST:g}."
        )
    if factor < 0:
        _say_inverted(float(factor))
    return float(factor)


@functools.cache
def _say_inverted(factor: float) -> None:
    logger.warning(
        "rescale_factor is %g, which inverts pictures; no published model expects that, so give 1 / 255, unless yours "
        "does.",
        factor,
    )


def _with_own_channels(image: Any) -> np.ndarray:
    """Return a picture's bytes as (H, W, C) without converting them to RGB."""
    if is_tensor(image):
        image = as_array(image)
    if isinstance(image, Image.Image) and image.mode in ("L", "LA", "RGBA"):
        check_opened(image)
        image = np.asarray(upright(image))
    if not isinstance(image, np.ndarray):
        return np.asarray(load_image(image))
    image = image if image.ndim == 3 else image[..., None]
    # Side by side, all channels are scaled to bytes alike, as one grey picture.
    height, width, channels = image.shape
    grey = np.asarray(load_image(image.reshape(height, width * channels)))[..., 0]
    return grey.reshape(height, width, channels)


def _batch(arrays: Sequence[np.ndarray], options: Mapping[str, Any], *, may_differ: bool) -> dict[str, Any]:
    """Pad pictures to one size and stack them, or list them as they are if their sizes may and do differ."""
    sizes = [(array.shape[1], array.shape[2]) for array in arrays]
    channels = sorted({array.shape[0] for array in arrays})
    if len(channels) > 1:
        raise ValueError(f"Pictures of {' and '.join(map(str, channels))} channels do not stack; convert them to RGB.")
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    is_last = options["data_format"] == "channels_last"
    data: dict[str, Any] = {}
    if options["pad_size"] is not None:
        pad = options["pad_size"]
        if pad["height"] < height or pad["width"] < width:
            raise ValueError(f"pad_size {pad} is smaller than an image of {height}x{width}; enlarge it or size.")
        height, width = pad["height"], pad["width"]
    elif not options["do_pad"] and len(set(sizes)) > 1:
        if not may_differ:
            raise ValueError(f"Images of sizes {sorted(set(sizes))} do not stack; set do_pad=True.")
        data["pixel_values"] = [torch.from_numpy(array) for array in arrays]
        data["pixel_mask"] = [torch.ones(size, dtype=torch.int64) for size in sizes]
    if not data:
        data["pixel_values"] = torch.zeros(len(arrays), channels[0], height, width)
        data["pixel_mask"] = torch.zeros(len(arrays), height, width, dtype=torch.int64)
        for index, array in enumerate(arrays):
            data["pixel_values"][index, :, : array.shape[1], : array.shape[2]] = torch.from_numpy(array)
            data["pixel_mask"][index, : array.shape[1], : array.shape[2]] = 1
    if is_last:
        values = data["pixel_values"]
        data["pixel_values"] = (
            [x.permute(1, 2, 0) for x in values] if isinstance(values, list) else values.permute(0, 2, 3, 1)
        )
    data["image_sizes"] = torch.tensor(sizes, dtype=torch.int64)
    return data
