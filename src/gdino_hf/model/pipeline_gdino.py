"""`pipeline("zero-shot-object-detection")` with one forward pass for all labels."""

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel, ZeroShotObjectDetectionPipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .picture_pixels import load_image
from .pipeline_inputs import pipeline_inputs
from .processing_gdino import GDinoProcessor
from .prompt_groups import forward_in_groups
from .remote_pictures import downloaded
from .text_prompt import parse_labels

_TASK = "zero-shot-object-detection"
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_PREPROCESS = ("timeout", "negative_labels")
_POSTPROCESS = ("threshold", "top_k", "nms_threshold", "text_threshold")


class GDinoZeroShotObjectDetectionPipeline(ZeroShotObjectDetectionPipeline):
    """Zero-shot detection that runs all labels of an image, or of a batch of images, in one forward pass.

    Labels that exceed one prompt share the image backbone's pass; see `forward_in_groups`. Arguments and results are
    those of the stock pipeline, and boxes lie within the picture. A call also takes `negative_labels` (labels that
    compete for boxes but are left out of results), and `text_threshold` and `nms_threshold` as in
    `GDinoProcessor.post_process_grounded_object_detection`. `candidate_labels` and `negative_labels` may be lists or
    text such as "cat, remote control", which `gdino_hf.model.text_prompt.split_labels` splits.

    For a model of another type, calling this class builds the stock pipeline.
    """

    # Not required, because a model in memory may come with a processor, which contains both.
    _load_tokenizer = None
    _load_image_processor = None

    processor: Any
    image_processor: Any
    tokenizer: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        model = kwargs.get("model", args[0] if args else None)
        if isinstance(model, PreTrainedModel) and model.config.model_type != "gdino":
            for name, auto_class in (("tokenizer", AutoTokenizer), ("image_processor", AutoImageProcessor)):
                if kwargs.get(name) is None:
                    # The stock pipeline requires both; loading them here raises an error that says why one is missing.
                    kwargs[name] = auto_class.from_pretrained(model.name_or_path)
            # Not an instance of cls, so Python does not call __init__ again.
            return ZeroShotObjectDetectionPipeline(*args, **kwargs)
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.processor, (str, os.PathLike)):
            self.processor = GDinoProcessor.from_pretrained(self.processor)
        if self.processor is None:
            self.processor = _find_processor(self.model, self.image_processor, self.tokenizer)
        self.tokenizer = self.processor.tokenizer
        self.image_processor = self.processor.image_processor
        if self.processor.max_text_len > self.model.config.max_text_len:
            self.processor = copy.copy(self.processor)
            self.processor.max_text_len = self.model.config.max_text_len

    def check_model_type(self, supported_models: Any) -> None:
        """Accept every gdino model."""

    def __call__(self, image: Any, candidate_labels: Any = None, **kwargs: Any) -> Any:
        """Detect objects in one picture or in several.

        Args:
            image: A picture (path, http(s) address, base64, bytes, PIL image, array, tensor or open file); a mapping
                with "image" and "candidate_labels" (or "text_queries"); a list, 4-D array, data set or generator of
                either.
            candidate_labels: Labels as a list or text, for all pictures that have none of their own; or one list per
                picture of a list.
            **kwargs: `threshold`, `top_k`, `text_threshold`, `nms_threshold`, `negative_labels`, `timeout` in seconds
                for addresses, `batch_size` and `num_workers`; `text_queries` is another name of candidate_labels.

        Returns:
            For one picture a list of {"score", "label", "box": {"xmin", "ymin", "xmax", "ymax"}}, best first; for a
            list of pictures a list of such lists, for a data set or generator an iterator over them.

        Raises:
            TypeError: The input or an option has another type or is unknown.
            ValueError: A picture or a label cannot be used, or a picture has no labels.
        """
        if "text_queries" in kwargs:
            queries = kwargs.pop("text_queries")
            if candidate_labels is not None and candidate_labels != queries:
                raise ValueError("candidate_labels and text_queries differ; give candidate_labels only.")
            candidate_labels = queries
        inputs = pipeline_inputs(image, candidate_labels)
        # The base class looks at the first of a list's elements.
        return super().__call__(inputs, **kwargs) if not isinstance(inputs, list) or inputs else []

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        if "box_threshold" in kwargs:
            threshold = kwargs.pop("box_threshold")
            if kwargs.setdefault("threshold", threshold) != threshold:
                raise ValueError(f"threshold {kwargs['threshold']} and box_threshold {threshold} differ; give one.")
            warnings.warn("box_threshold is now called threshold; use that name.", FutureWarning, stacklevel=3)
        unknown = sorted(set(kwargs) - {*_PREPROCESS, *_POSTPROCESS})
        if unknown:
            raise TypeError(
                f"There is no option {unknown[0]!r}; the pipeline takes {', '.join((*_PREPROCESS, *_POSTPROCESS))}."
            )
        preprocess = {name: kwargs[name] for name in _PREPROCESS if name in kwargs}
        return preprocess, {}, {name: kwargs[name] for name in _POSTPROCESS if name in kwargs}

    def preprocess(
        self,
        inputs: Mapping[str, Any],
        timeout: float | None = None,
        negative_labels: str | Sequence[str] | None = None,
    ) -> Any:
        """Read one image and its labels. Tensors are made per batch, because images and prompts differ in size."""
        yield {
            "is_last": True,
            "image": load_image(downloaded(inputs["image"], timeout)),
            "labels": parse_labels(inputs["candidate_labels"]),
            "negative_labels": parse_labels(negative_labels) if negative_labels else [],
        }

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        batched = isinstance(model_inputs["image"], list)
        images, labels, negatives = (
            model_inputs[name] if batched else [model_inputs[name]] for name in ("image", "labels", "negative_labels")
        )
        inputs = self.processor(images=images, text=labels, negative_labels=negatives[0]).to(self.device)
        outputs = forward_in_groups(self.model, inputs)
        # The chunks of one image's labels are adjacent, so each image is a slice of rows.
        rows = [len(prompt.chunks) for prompt in inputs.prompts or []]
        results: dict[str, Any] = {
            "is_last": [True] * len(images),
            "target_size": [(image.height, image.width) for image in images],
            "prompt": inputs.prompts,
            "logits": list(outputs.logits.float().split(rows)),
            "pred_boxes": list(outputs.pred_boxes.split(rows)),
        }
        return results if batched else {name: value[0] for name, value in results.items()}

    def postprocess(
        self,
        model_outputs: Sequence[dict[str, Any]],
        threshold: float = 0.1,
        top_k: int | None = None,
        nms_threshold: float | None = None,
        text_threshold: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Turn outputs into the stock pipeline's results, best first."""
        (output,) = model_outputs
        # Tensors from a batch have one more axis than those of a single image.
        tensors = {name: output[name].reshape(-1, *output[name].shape[-2:]) for name in ("logits", "pred_boxes")}
        found = self.processor.post_process_grounded_object_detection(
            SimpleNamespace(**tensors),
            SimpleNamespace(prompts=[output["prompt"]]),
            threshold=threshold,
            text_threshold=text_threshold,
            target_sizes=[output["target_size"]],
            nms_threshold=nms_threshold,
            top_k=top_k or None,
        )[0]
        height, width = output["target_size"]
        # The model may place a side slightly outside of the picture.
        boxes = found["boxes"].clamp(min=0).minimum(found["boxes"].new_tensor([width, height, width, height]))
        return [
            {"score": score, "label": label, "box": dict(zip(_SIDES, box.int().tolist(), strict=True))}
            for score, label, box in zip(found["scores"].tolist(), found["text_labels"], boxes, strict=True)
        ]


def register_pipeline() -> None:
    """Make `pipeline("zero-shot-object-detection")` build this pipeline for gdino models, the stock one for others."""
    task = PIPELINE_REGISTRY.supported_tasks[_TASK]
    # Written into the entry, because transformers' register_pipeline would warn and drop the task's other fields.
    task["impl"] = GDinoZeroShotObjectDetectionPipeline


def _find_processor(model: PreTrainedModel, image_processor: Any, tokenizer: Any) -> GDinoProcessor:
    """Make the processor from its parts, or load it from where the model was loaded."""
    if image_processor is not None and tokenizer is not None:
        return GDinoProcessor(image_processor, tokenizer, **_saved_settings(model.name_or_path))
    try:
        return GDinoProcessor.from_pretrained(model.name_or_path)
    except (OSError, ValueError) as error:
        files = (
            os.path.join(model.name_or_path, name) for name in ("processor_config.json", "preprocessor_config.json")
        )
        if isinstance(error, ValueError) and any(map(os.path.isfile, files)):
            raise
        raise ValueError(
            f"The model {model.name_or_path or 'in memory'} has no processor beside it; pass processor=."
        ) from error


def _saved_settings(folder: str) -> dict[str, Any]:
    """Return the settings of a saved processor that its parts, which transformers loads separately, lack."""
    try:
        saved, _ = GDinoProcessor.get_processor_dict(folder)
    except (OSError, ValueError):
        return {}
    return {name: saved[name] for name in ("max_text_len", "nms_threshold") if name in saved}
