"""gdino_export.json: everything that a runtime has to know about an exported folder, as data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..detection.detection_options import THRESHOLD
from ..detection.exported_folder import FORMAT_VERSION
from ..model.text_prompt import Prompt, special_token_ids
from .graphs import GraphPlan

_DTYPES = {"torch.float32": "float32", "torch.int64": "int64"}
_IMAGE_FIELDS = (
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_pad",
    "pad_size",
)


def document(
    *,
    model_format: str,
    variant: str,
    runtime: Mapping[str, str],
    opset: int | None,
    plans: Sequence[GraphPlan],
    processor: Any,
    config: Any,
    prompt: Prompt | None,
    static: bool,
) -> dict[str, Any]:
    """Describe an exported folder, without its files and figures.

    Args:
        model_format: "onnx", "openvino", "executorch" or "torch-export".
        variant: "whole", "split" or "baked".
        runtime: "name" and "least_version" of the library that runs the graphs.
        opset: Version of ONNX's operators, or None.
        plans: The graphs.
        processor: The model's processor.
        config: The model's configuration.
        prompt: The prompt of a baked graph, or None.
        static: Whether every axis has the size of the example.

    Returns:
        The document, to which `files` and `figures` are added once they are known.
    """
    from .. import __version__

    image = processor.image_processor
    special = special_token_ids(processor.tokenizer)
    return {
        "format_version": FORMAT_VERSION,
        "gdino_hf_version": __version__,
        "format": model_format,
        "variant": variant,
        "precision": "float32",
        "runtime": dict(runtime),
        "opset": opset,
        "files": {},
        "image": {name: getattr(image, name) for name in _IMAGE_FIELDS},
        "text": {
            "max_text_len": min(processor.max_text_len, config.max_text_len),
            "start_id": special[0],
            "end_id": special[1],
            "period_id": special[2],
            "question_id": special[3] if len(special) > 3 else None,
            "unknown_id": processor.tokenizer.unk_token_id,
            "pad_id": processor.tokenizer.pad_token_id or 0,
            "block_ids": list(config.special_token_ids),
        },
        "post": {
            "threshold": THRESHOLD,
            "score": "max",
            "nms_threshold": processor.nms_threshold,
            "similarity": config.class_head,
            "num_queries": config.num_queries,
        },
        "labels": None if prompt is None else _baked(prompt),
        "graphs": {plan.role: _ports(plan, static) for plan in plans},
        "figures": {},
    }


def file_entry(path: Path) -> dict[str, Any]:
    """Return name, bytes and sha256 of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


def to_json(content: Mapping[str, Any]) -> str:
    """Return the document as text."""
    return json.dumps(content, indent=2, ensure_ascii=False, default=list) + "\n"


def _baked(prompt: Prompt) -> dict[str, Any]:
    chunk = prompt.chunks[0]
    return {
        "names": list(prompt.labels),
        "input_ids": list(chunk.input_ids),
        "label_indices": list(chunk.label_indices),
        "spans": [list(span) for span in chunk.spans],
    }


def _ports(plan: GraphPlan, static: bool) -> dict[str, Any]:
    """Return dtype and axes of every input and output; a dynamic axis has a name, a fixed one a number."""
    sizes = {
        axis: size
        for name, value in plan.inputs.items()
        for axis, size in zip(plan.axes(name), value.shape, strict=True)
        if isinstance(axis, str)
    }

    def shape(axes: Sequence[Any]) -> list[Any]:
        return [sizes[axis] if static and isinstance(axis, str) else axis for axis in axes]

    return {
        "inputs": {
            name: {"dtype": _DTYPES[str(value.dtype)], "shape": shape(plan.axes(name))}
            for name, value in plan.inputs.items()
        },
        "outputs": {name: {"dtype": "float32", "shape": shape(axes)} for name, axes in plan.outputs.items()},
    }
