"""Time gdino-nano with 20 labels against the stock pipeline, which runs the labels one by one.

    python tests/benchmarks/bench_nano.py [--threads 2] [--repeats 5] [--plain] [--stream 90]

Times include reading and decoding the photographs. The stock pipeline of transformers prepares the image and runs one
forward for each label. The pipeline takes one photograph after the other, and `Detector.stream` takes as many as
`--stream` says; `--stream-only` leaves the pipelines out.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import ZeroShotObjectDetectionPipeline, pipeline

import gdino_hf
from gdino_hf import NANO, Detector
from gdino_hf.model.image_processing_gdino import load_image

LABELS = ["cat", "dog", "person", "cup", "chair", "table", "car", "book", "bottle", "phone"]
LABELS += ["hat", "tree", "bird", "ball", "lion", "laptop", "keyboard", "shoe", "bag", "clock"]
PHOTOGRAPHS = sorted((Path(__file__).resolve().parents[2] / "demo" / "examples").glob("*.jpg"))


def stock_pass(detector, path):
    """Do what the stock pipeline does with one image: preprocessing and a forward for each label."""
    image = load_image(str(path))
    for label in LABELS:
        text = detector.tokenizer(label + ".", return_tensors="pt")
        pixels = detector.image_processor(image, return_tensors="pt")
        with torch.no_grad():
            detector.model(
                pixel_values=pixels["pixel_values"],
                input_ids=text["input_ids"],
                attention_mask=text["attention_mask"],
            )


def stream_photographs(count, repeats):
    """Print how many photographs a second `Detector.stream` detects in."""
    detector = Detector("nano", device="cpu")
    paths = (PHOTOGRAPHS * count)[:count]
    rates, cpu = [], []
    for number in range(repeats + 1):
        start, start_cpu = time.perf_counter(), time.process_time()
        assert len(list(detector.stream(paths, LABELS))) == count
        if number > 0:  # the first pass packs the weights
            rates.append(count / (time.perf_counter() - start))
            cpu.append((time.process_time() - start_cpu) / count)
    rates.sort()
    print(
        f"Detector.stream, {count} photographs  {statistics.median(rates):6.2f} images/s "
        f"({rates[0]:.2f} to {rates[-1]:.2f}), {1e3 * statistics.median(cpu):.1f} ms CPU per image"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="do not call optimize_for_inference()")
    parser.add_argument("--stream", type=int, default=90, help="photographs for Detector.stream")
    parser.add_argument("--stream-only", action="store_true", help="leave the pipelines out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stream_photographs(args.stream, args.repeats)
    if args.stream_only:
        return
    detector = pipeline("zero-shot-object-detection", model=NANO)
    assert isinstance(detector, gdino_hf.GDinoZeroShotObjectDetectionPipeline)
    assert isinstance(detector, ZeroShotObjectDetectionPipeline)
    stock = pipeline("zero-shot-object-detection", model=NANO)
    if not args.plain:
        detector.model.optimize_for_inference()
    ways = {
        "pipeline, all labels in one forward": lambda path: detector(str(path), candidate_labels=LABELS),
        "stock, one forward per label": lambda path: stock_pass(stock, path),
    }
    seconds = {name: [] for name in ways}
    cpu = {name: [] for name in ways}
    for way in ways.values():
        way(PHOTOGRAPHS[0])
    for _ in range(args.repeats):
        for name, way in ways.items():
            for path in PHOTOGRAPHS:
                start, start_cpu = time.perf_counter(), time.process_time()
                way(path)
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - start_cpu)
    ours = next(iter(ways))
    print(f"{len(LABELS)} labels, {len(PHOTOGRAPHS)} photographs, {args.threads} threads, medians")
    for name in ways:
        wall, work = statistics.median(seconds[name]), statistics.median(cpu[name])
        print(
            f"{name:38}{1 / wall:8.2f} images/s{1e3 * wall:10.1f} ms wall{1e3 * work:10.1f} ms CPU   "
            f"{wall / statistics.median(seconds[ours]):6.1f} times ours ({work / statistics.median(cpu[ours]):.1f} CPU)"
        )


if __name__ == "__main__":
    main()
