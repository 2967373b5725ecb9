"""Export a full-size Grounding DINO-T with random weights, and compare each runtime with PyTorch.

    python tests/benchmarks/bench_export_full_size.py [--formats onnx openvino] [--size 800 1066] [--threads 2]

The architecture is that of grounding-dino-tiny: Swin-T, a text encoder of BERT-base's size, 900 queries. For each
format it prints the seconds and the peak memory of the export and the size of its files, then the seconds and the peak
memory of a run and the largest differences from PyTorch. Every query is compared with PyTorch's nearest one; if "agree"
equals "queries", both sides have selected the same queries. Each step is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_exports import processor_name
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gdino_hf import NANO, GDinoConfig, GDinoImageProcessor, GDinoProcessor
from gdino_hf.detection.exported_folder import ExportedFolder
from gdino_hf.detection.exported_graphs import load_graphs
from gdino_hf.export import export
from random_models import make_random_model

PROMPT = "a cat. a remote control. a person."
LOGITS, BOXES = 1e-3, 1e-4
"""Largest differences of logits and of boxes, in parts of the picture, with which a query agrees."""


def parts():
    """Return the model and its processor; the tokenizer is gdino-nano's, whose vocabulary is smaller than BERT's."""
    torch.set_grad_enabled(False)
    processor = GDinoProcessor(GDinoImageProcessor(), AutoTokenizer.from_pretrained(NANO))
    return make_random_model(GDinoConfig()), processor


def example(processor, size):
    """Return the inputs of one picture of noise and one prompt."""
    text = processor.tokenizer([PROMPT], return_tensors="pt")
    pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, *size, dtype=torch.int64)
    return {"pixel_values": pixels, "pixel_mask": mask} | {name: text[name] for name in ("input_ids", "attention_mask")}


def compute(folder, size):
    """Save the inputs and what PyTorch computes; return the seconds."""
    model, processor = parts()
    inputs = example(processor, size)
    started = time.perf_counter()
    outputs = model(**inputs)
    seconds = time.perf_counter() - started
    logits = outputs.logits[..., : inputs["input_ids"].shape[1]]
    torch.save({"inputs": inputs, "logits": logits, "boxes": outputs.pred_boxes}, folder / "expected.pt")
    return {"seconds": seconds}


def write(folder, model_format):
    """Export the model; return the seconds and the size of the files."""
    model, processor = parts()
    started = time.perf_counter()
    out = export(model, folder / model_format, format=model_format, processor=processor)
    seconds = time.perf_counter() - started
    content = json.loads((out / "gdino_export.json").read_text())
    return {"seconds": seconds, "megabytes": sum(entry["bytes"] for entry in content["files"].values()) / 1e6}


def run(folder, model_format):
    """Run the exported model twice; return the seconds of the second time and how far it agrees with PyTorch."""
    expected = torch.load(folder / "expected.pt")
    graph = load_graphs(ExportedFolder.read(folder / model_format))["model"]
    graph(expected["inputs"])
    started = time.perf_counter()
    found = graph(expected["inputs"])
    seconds = time.perf_counter() - started
    logits, boxes = found["logits"][0].nan_to_num(neginf=0), found["pred_boxes"][0]
    wanted, wanted_boxes = expected["logits"][0].nan_to_num(neginf=0), expected["boxes"][0]
    apart = torch.cdist(boxes, wanted_boxes, p=torch.inf) + torch.cdist(logits, wanted, p=torch.inf)
    nearest = apart.argmin(1)
    logits_apart = (logits - wanted[nearest]).abs().amax(1)
    boxes_apart = (boxes - wanted_boxes[nearest]).abs().amax(1)
    agree = nearest[(logits_apart < LOGITS) & (boxes_apart < BOXES)].unique()
    return {
        "seconds": seconds,
        "queries": len(nearest),
        "agree": len(agree),
        "moved": int((nearest != torch.arange(len(nearest))).sum()),
        "logits": float(logits_apart.max()),
        "boxes": float(boxes_apart.max()),
    }


def _step(pipe, threads, function, arguments):
    torch.set_num_threads(threads)
    result = function(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    pipe.send({"peak megabytes": peak / 1e6} | result)


def alone(threads, function, *arguments):
    """Call a function in a process of its own, and print what it returns with the peak memory."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_step, args=(there, threads, function, arguments))
    process.start()
    there.close()
    result = here.recv()
    process.join()
    shown = ", ".join(f"{name} {value:.4g}" for name, value in result.items())
    print(f"{function.__name__:8}{arguments[1]!s:14}{shown}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=["onnx", "openvino"])
    parser.add_argument("--size", nargs=2, type=int, default=[800, 1066])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print(f"CPU: {processor_name()}, {args.threads} threads, {args.size[0]} x {args.size[1]} pixels", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        alone(args.threads, compute, Path(folder), args.size)
        for model_format in args.formats:
            alone(args.threads, write, Path(folder), model_format)
            alone(args.threads, run, Path(folder), model_format)


if __name__ == "__main__":
    main()
