"""A segmenter from a name, a folder or a model, refused in one sentence if it cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ..detection.loading import check_place, check_weights, local_option
from ..error_text import reason
from .segmenter_inputs import Look

DTYPES = ("float32", "bfloat16", "float16")
"""Data types of a segmenter's computation."""

# Types of checkpoints with a model that takes boxes; a checkpoint of a video model holds the one for pictures.
_SQUARE_TYPES = ("sam2", "sam2_video", "edgetam", "edgetam_video", "sam3_tracker", "sam3_video")
_PADDED_TYPES = ("sam", "sam_hq")
_SQUARE_MODELS = ("Sam2Model", "EdgeTamModel", "Sam3TrackerModel")
_PADDED_MODELS = ("SamModel", "SamHQModel")
_FAMILY = "SAM, SAM-HQ, SAM 2, SAM 2.1, SAM 3's tracker or EdgeTAM"
_VIDEO_TYPES, _VIDEO_MODEL, _VIDEO_FAMILY = ("sam2_video",), "Sam2VideoModel", "SAM 2 or SAM 2.1 for videos"
# What the processors of transformers have by default.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class SegmenterError(ValueError):
    """A segmenter that cannot be loaded.

    Args:
        model: Hub id or folder.
        why: The reason, as a part of a sentence.
        family: Names of the models that can be used.
    """

    def __init__(self, model: str, why: str, family: str) -> None:
        super().__init__(f"The segmenter {model} cannot be loaded ({why}); give a Hub id or a folder of {family}.")
        self.why = why


@dataclass(frozen=True)
class LoadedSegmenter:
    """A segmenter and how it looks at pictures.

    Attributes:
        model: The model.
        look: How it looks at pictures.
    """

    model: Any
    look: Look


def load_segmenter(model: str, dtype: str = "float32") -> LoadedSegmenter:
    """Load a segmenter.

    Args:
        model: Hub id or folder.
        dtype: One of `DTYPES`.

    Returns:
        The model on the CPU.

    Raises:
        SegmenterError: It cannot be loaded; the message says why.
    """
    from transformers import AutoModelForMaskGeneration

    return _load(
        AutoModelForMaskGeneration, model, dtype, (*_SQUARE_TYPES, *_PADDED_TYPES), "boxes cannot prompt", _FAMILY
    )


def load_video_segmenter(model: str, dtype: str = "float32") -> LoadedSegmenter:
    """Load a model that follows objects through videos.

    Args:
        model: Hub id or folder.
        dtype: One of `DTYPES`.

    Returns:
        The model, a `Sam2VideoModel`, on the CPU.

    Raises:
        SegmenterError: It cannot be loaded; the message says why.
    """
    from transformers import Sam2VideoModel

    return _load(Sam2VideoModel, model, dtype, _VIDEO_TYPES, "follows nothing through videos", _VIDEO_FAMILY)


def wrap_video_segmenter(model: Any) -> LoadedSegmenter:
    """Return a model object that follows objects through videos, as `wrap_segmenter` does.

    Raises:
        TypeError: It is no `Sam2VideoModel`.
    """
    if _VIDEO_MODEL not in {kind.__name__ for kind in type(model).__mro__}:
        raise TypeError(
            f"A tracker by masks takes a Hub id, a folder or a model of {_VIDEO_FAMILY}, got {type(model).__name__}."
        )
    return _wrapped(model)


def _load(kind: Any, model: str, dtype: str, types: tuple[str, ...], cannot: str, family: str) -> LoadedSegmenter:
    # Loaders raise exceptions of any type on damaged or unreachable checkpoints.
    try:
        local = local_option(model)
        _check_type(model, local, types, cannot)
        loaded, loading = kind.from_pretrained(model, dtype=dtype, output_loading_info=True, **local)
        check_weights(loading["missing_keys"])
        return LoadedSegmenter(loaded, _look(loaded, model, local))
    except Exception as error:
        raise SegmenterError(model, reason(error), family) from error


def wrap_segmenter(model: Any) -> LoadedSegmenter:
    """Return a model object with how it looks at pictures: as the files tell that it was loaded from, or by default.

    Raises:
        TypeError: It is no model that takes boxes.
    """
    names = {kind.__name__ for kind in type(model).__mro__}
    if not names & {*_SQUARE_MODELS, *_PADDED_MODELS}:
        raise TypeError(
            f"Segmenter takes a Hub id, a folder, or a model that boxes can prompt ({_FAMILY}), got "
            f"{type(model).__name__}."
        )
    return _wrapped(model)


def _wrapped(model: Any) -> LoadedSegmenter:
    where = str(model.name_or_path or "")
    return LoadedSegmenter(model, _look(model, where, local_option(where) if where else {}))


def _check_type(model: str, local: dict[str, bool], types: tuple[str, ...], cannot: str) -> None:
    """Refuse what is not there, and models that take no boxes."""
    from transformers import PreTrainedConfig

    check_place(model, local)
    config, _ = PreTrainedConfig.get_config_dict(model, **local)
    kind = config.get("model_type")
    if not config:
        raise ValueError("there is no config.json in it")
    if kind not in types:
        raise ValueError(f"its model_type is {kind!r}, which {cannot}")
    if kind.startswith("edgetam") and find_spec("timm") is None:
        raise ValueError("its image encoder is one of timm: pip install timm")


def _look(model: Any, where: str, local: dict[str, bool]) -> Look:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        if not where:
            raise OSError("a model made in memory has no files")
        settings, _ = ImageProcessingMixin.get_image_processor_dict(where, **local)
    except OSError:
        settings = {}
    if any(kind.__name__ in _PADDED_MODELS for kind in type(model).__mro__):
        return _padded_look(model, settings)
    size, side = settings.get("size") or {}, model.config.prompt_encoder_config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    seen = (int(size.get("height", height)), int(size.get("width", width)))
    if seen != (height, width):
        raise ValueError(f"its processor makes pictures of {seen[1]}x{seen[0]} pixels, its model sees {width}x{height}")
    mean, std = _HALVES if "Sam3" in type(model).__name__ else _IMAGENET
    return Look(
        seen,
        tuple(settings.get("image_mean") or mean),
        tuple(settings.get("image_std") or std),
        int(settings.get("resample", 2)),
    )


def _padded_look(model: Any, settings: dict[str, Any]) -> Look:
    """Return the look of a model with transformers' processor, which is there with and without torchvision."""
    side = int(model.config.vision_config.image_size)
    own = {"size": {"longest_edge": side}, "pad_size": {"height": side, "width": side}}
    processor = _image_processor_class()(**{**own, **settings})
    padded = processor.pad_size
    if (int(padded["height"]), int(padded["width"])) != (side, side):
        raise ValueError(f"its processor fills pictures to {padded}, but the model sees {side}x{side} pixels")
    return Look((side, side), processor=processor)


def _image_processor_class() -> Any:
    import transformers
    from transformers.utils import is_torchvision_available

    name = "SamImageProcessor" if is_torchvision_available() else "SamImageProcessorPil"
    return getattr(transformers, name)
