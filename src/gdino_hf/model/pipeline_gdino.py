"""`pipeline("zero-shot-object-detection")` with one forward for all labels."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, ZeroShotObjectDetectionPipeline
from transformers.image_utils import load_image
from transformers.pipelines import PIPELINE_REGISTRY

from .image_processing_gdino import to_rgb
from .processing_gdino import GDinoProcessor

_TASK = "zero-shot-object-detection"


class GDinoZeroShotObjectDetectionPipeline(ZeroShotObjectDetectionPipeline):
    """The stock pipeline's arguments and results; all candidate labels of an image share one forward.

    Built for a model of another type, it is the stock pipeline.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        model = kwargs.get("model", args[0] if args else None)
        if isinstance(model, PreTrainedModel) and model.config.model_type != "gdino":
            # Not a subclass of cls, so Python leaves its construction to us.
            return ZeroShotObjectDetectionPipeline(*args, **kwargs)
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.processor is None:
            self.processor = GDinoProcessor(image_processor=self.image_processor, tokenizer=self.tokenizer)
        self.processor.max_text_len = min(self.processor.max_text_len, self.model.config.max_text_len)

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
        self, inputs: dict[str, Any], timeout: float | None = None, negative_labels: Sequence[str] | None = None
    ) -> Any:
        """One set of inputs per image."""
        image = to_rgb(load_image(inputs["image"], timeout=timeout))
        labels = inputs["candidate_labels"]
        if isinstance(labels, str):
            labels = [label.strip() for label in labels.split(",")]
        features = self.processor(images=image, text=list(labels), negative_labels=negative_labels)
        features["pixel_values"] = features["pixel_values"].to(self.dtype)
        yield {
            "is_last": True,
            "target_size": torch.tensor([[image.height, image.width]], dtype=torch.int32),
            "prompts": features.prompts,
            **features,
        }

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        kept = {name: model_inputs.pop(name) for name in ("is_last", "target_size", "prompts")}
        outputs = self.model(**model_inputs)
        return {**kept, "logits": outputs.logits, "pred_boxes": outputs.pred_boxes}

    def postprocess(
        self,
        model_outputs: Sequence[dict[str, Any]],
        threshold: float = 0.1,
        top_k: int | None = None,
        nms_threshold: float | None = None,
        text_threshold: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Results as the stock pipeline gives them, best first."""
        results = []
        for output in model_outputs:
            found = self.processor.post_process_grounded_object_detection(
                _Outputs(output),
                _Outputs(output),
                threshold=threshold,
                text_threshold=text_threshold,
                target_sizes=output["target_size"],
                nms_threshold=nms_threshold,
                top_k=top_k,
            )[0]
            for score, label, box in zip(
                found["scores"].tolist(), found["text_labels"], found["boxes"], strict=True
            ):
                results.append({"score": score, "label": label, "box": self._get_bounding_box(box)})
        return results


class _Outputs:
    """Attribute access to a step's dictionary."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)


def register_pipeline() -> None:
    """Let `pipeline("zero-shot-object-detection")` build ours for gdino models and the stock one for all others."""
    task = PIPELINE_REGISTRY.supported_tasks[_TASK]
    # Written into the entry: register_pipeline would warn, and drop the default model and the accepted classes.
    task["impl"] = GDinoZeroShotObjectDetectionPipeline
