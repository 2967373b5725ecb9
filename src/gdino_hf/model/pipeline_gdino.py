"""`pipeline("zero-shot-object-detection")` with one forward for all labels."""

import base64
import copy
import os
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel, ZeroShotObjectDetectionPipeline
from transformers.image_utils import load_image as load_remote_image
from transformers.pipelines import PIPELINE_REGISTRY

from .image_processing_gdino import load_image
from .processing_gdino import GDinoProcessor
from .text_prompt import parse_labels

_TASK = "zero-shot-object-detection"
_REMOTE = ("http://", "https://", "data:image/")
# Characters of base64 that any picture needs; what is shorter is a path.
_SHORTEST_PICTURE = 64


class GDinoZeroShotObjectDetectionPipeline(ZeroShotObjectDetectionPipeline):
    """The stock pipeline's arguments and results; all labels of an image, or of a batch of images, share one forward.

    Beyond the stock arguments a call takes `negative_labels` (compete for boxes, left out of results),
    `text_threshold` and `nms_threshold` as in `GDinoProcessor.post_process_grounded_object_detection`.
    `candidate_labels` may also be one string, "cat, remote control" or "a cat. a remote control.".

    Built for a model of another type, it is the stock pipeline.
    """

    # Loaded where they can be found: a model in memory may come with a processor alone.
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
                    # The stock pipeline insists on both: let the reason why one is missing be heard.
                    kwargs[name] = auto_class.from_pretrained(model.name_or_path)
            # Not an instance of cls, so Python leaves its construction to us.
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
        """Any gdino model will do."""

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if "negative_labels" in kwargs:
            preprocess["negative_labels"] = kwargs["negative_labels"]
        for name in ("nms_threshold", "text_threshold"):
            if name in kwargs:
                postprocess[name] = kwargs[name]
        return preprocess, forward, postprocess

    def preprocess(
        self,
        inputs: Mapping[str, Any],
        timeout: float | None = None,
        negative_labels: str | Sequence[str] | None = None,
    ) -> Any:
        """Read one image and its labels; tensors are made per batch, since images and prompts differ in size."""
        image = inputs["image"]
        if isinstance(image, str) and image.startswith(_REMOTE):
            image = load_remote_image(image, timeout=timeout)
        elif isinstance(image, str):
            image = _decoded(image)
        yield {
            "is_last": True,
            "image": load_image(image),
            "labels": parse_labels(inputs["candidate_labels"]),
            "negative_labels": parse_labels(negative_labels) if negative_labels else [],
        }

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        batched = isinstance(model_inputs["image"], list)
        images, labels, negatives = (
            model_inputs[name] if batched else [model_inputs[name]] for name in ("image", "labels", "negative_labels")
        )
        inputs = self.processor(images=images, text=labels, negative_labels=negatives[0]).to(self.device)
        outputs = self.model(**inputs)
        # Chunks of one image's labels stand together, so an image is a slice of rows.
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
        """Results as the stock pipeline gives them, best first."""
        (output,) = model_outputs
        # Taken out of a batch, a tensor comes with one more axis than alone.
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
        return [
            {"score": score, "label": label, "box": self._get_bounding_box(box)}
            for score, label, box in zip(found["scores"].tolist(), found["text_labels"], found["boxes"], strict=True)
        ]


def register_pipeline() -> None:
    """Let `pipeline("zero-shot-object-detection")` build ours for gdino models and the stock one for all others."""
    task = PIPELINE_REGISTRY.supported_tasks[_TASK]
    # Written into the entry: register_pipeline would warn, and drop the default model and the accepted classes.
    task["impl"] = GDinoZeroShotObjectDetectionPipeline


def _find_processor(model: PreTrainedModel, image_processor: Any, tokenizer: Any) -> GDinoProcessor:
    """From its parts, or from where the model came from."""
    if image_processor is not None and tokenizer is not None:
        return GDinoProcessor(image_processor, tokenizer, **_saved_length(model.name_or_path))
    try:
        return GDinoProcessor.from_pretrained(model.name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no processor with the model {model.name_or_path or 'in memory'}; pass processor=."
        ) from error


def _saved_length(folder: str) -> dict[str, int]:
    """The max_text_len of a saved processor: its parts, which transformers loads on their own, do not have it."""
    try:
        saved, _ = GDinoProcessor.get_processor_dict(folder)
    except (OSError, ValueError):
        return {}
    return {"max_text_len": saved["max_text_len"]} if "max_text_len" in saved else {}


def _decoded(image: str) -> str | bytes:
    """A path as it is, a picture in base64 as bytes."""
    if len(image) < _SHORTEST_PICTURE or os.path.isfile(image):
        return image
    try:
        return base64.b64decode("".join(image.split()), validate=True)
    except ValueError:
        return image
