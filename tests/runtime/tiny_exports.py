"""Exported folders whose graphs are a few operators: scores follow from tokens, pixels and the table below."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

import gdino_hf

QUERIES = 6
VOCABULARY = 30522
BAKED = {
    "names": ["cat", "cup"],
    "input_ids": [101, 4937, 1012, 2452, 1012, 102],
    "label_indices": [0, 1],
    "spans": [[1, 2], [3, 4]],
}
"""Labels of the variant "baked", as the document states them."""


IMAGE = {
    "do_resize": True,
    "size": {"shortest_edge": 40, "longest_edge": 60},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""Settings of pictures, as the document states them."""


def table() -> np.ndarray:
    """Return (vocabulary, Q) logits of each token for each query."""
    return np.random.default_rng(7).normal(0, 2, (VOCABULARY, QUERIES)).astype(np.float32)


def boxes() -> np.ndarray:
    """Return (1, Q, 4) cxcywh boxes in [0, 1]."""
    return np.random.default_rng(8).uniform(0.2, 0.8, (1, QUERIES, 4)).astype(np.float32)


def write_export(folder: Path, variant: str = "whole", batch: Any = "batch", **changes: Any) -> Path:
    """Write an exported folder.

    Args:
        folder: Where to; it is made.
        variant: "whole", "split" or "baked".
        batch: Name of the batch axis, or its fixed length.
        **changes: Entries of the document that differ.
    """
    from onnx import TensorProto, checker, helper, numpy_helper, save

    folder.mkdir(parents=True)
    number, integer = TensorProto.FLOAT, TensorProto.INT64
    pixels = helper.make_tensor_value_info("pixel_values", number, [batch, 3, "height", "width"])
    mask = helper.make_tensor_value_info("pixel_mask", integer, [batch, "height", "width"])
    ids = helper.make_tensor_value_info("input_ids", integer, [batch, "tokens"])
    features = helper.make_tensor_value_info("text_features", number, [batch, "tokens", QUERIES])
    logits = helper.make_tensor_value_info("logits", number, [batch, QUERIES, "tokens"])
    found = helper.make_tensor_value_info("pred_boxes", number, [batch, QUERIES, 4])
    constants = {"table": table(), "boxes": boxes(), "axes": np.array([1, 2, 3]), "mask_axes": np.array([1, 2])}
    constants |= {"baked": np.array([BAKED["input_ids"]])}
    text = [helper.make_node("Gather", ["table", "input_ids"], ["text_features"])]
    # Logits move with the mean of the real pixels, boxes are the same for every picture.
    image = [
        helper.make_node("ReduceSum", ["pixel_values", "axes"], ["total"], keepdims=1),
        helper.make_node("Cast", ["pixel_mask"], ["real"], to=number),
        helper.make_node("ReduceSum", ["real", "mask_axes"], ["count"], keepdims=1),
        helper.make_node("Squeeze", ["total", "last"], ["sum"]),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        helper.make_node("Transpose", ["text_features"], ["scores"], perm=[0, 2, 1]),
        helper.make_node("Add", ["scores", "mean"], ["logits"]),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Add", ["boxes", "nothing"], ["pred_boxes"]),
    ]
    constants |= {"last": np.array([3]), "zero": np.array(0, dtype=np.float32)}
    graphs = {
        "whole": {"model": ([*text, *image], [pixels, mask, ids], [logits, found])},
        "split": {"text": (text, [ids], [features]), "image": (image, [pixels, mask, features], [logits, found])},
        "baked": {
            "model": (
                [helper.make_node("Gather", ["table", "baked"], ["text_features"]), *image],
                [pixels, mask],
                [logits, found],
            )
        },
    }[variant]
    files = {}
    for role, (nodes, inputs, outputs) in graphs.items():
        for number, node in enumerate(nodes):
            node.name = f"{node.op_type}_{number}"
        used = {name for node in nodes for name in node.input}
        weights = [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used]
        graph = helper.make_graph(nodes, role, inputs, outputs, weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        checker.check_model(model)
        save(model, folder / f"{role}.onnx")
        content = (folder / f"{role}.onnx").read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        files[role] = {"name": f"{role}.onnx", "bytes": len(content), "sha256": digest}
    (folder / "tokenizer.json").write_bytes((Path(gdino_hf.NANO) / "tokenizer.json").read_bytes())
    document = {
        "format_version": 1,
        "format": "onnx",
        "variant": variant,
        "runtime": {"name": "onnxruntime", "least_version": "1.20"},
        "files": files,
        "image": IMAGE,
        "text": {"max_text_len": 12, "start_id": 101, "end_id": 102, "unknown_id": 100, "pad_id": 0},
        "labels": BAKED if variant == "baked" else None,
    }
    (folder / "gdino_export.json").write_text(json.dumps(document))
    return edited(folder, changes)


def edited(folder: Path, changes: dict[str, Any]) -> Path:
    """Change entries of a folder's document."""
    path = folder / "gdino_export.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def with_settings(folder: Path) -> Path:
    """Add the files from which `gdino_hf.Detector` rebuilds the configuration and the processor."""
    config = gdino_hf.GDinoConfig.from_pretrained(gdino_hf.NANO)
    config.num_queries, config.max_text_len = QUERIES, 12
    processor = gdino_hf.GDinoProcessor.from_pretrained(gdino_hf.NANO)
    processor.image_processor.size, processor.max_text_len = {"shortest_edge": 40, "longest_edge": 60}, 12
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
