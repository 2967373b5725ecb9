"""Compare latency, size and AP50 of gdino-nano in PyTorch and of folders that gdino export wrote.

    python tests/benchmarks/bench_exports.py nano-onnx nano-onnx-int8 nano-openvino nano-openvino-int8 \\
        --data val.json [--pictures 60] [--threads 1 2] [--repeats 5]

Prints a table in Markdown. Each cell of latency is a process of its own: the median time of a photograph of
demo/examples from file to boxes, with 20 labels. AP50 is measured on the first pictures of a COCO file, all of its
labels at once. "boxes kept" is the share of PyTorch's detections from a score of 0.3 in these pictures for which the
row has a detection of the same label, all four sides within 2 pixels, with a score from 0.3; in brackets, with one from
0.2, as scores near the threshold cross it. Without --data both columns are left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LABELS = ["cat", "dog", "person", "cup", "chair", "table", "car", "book", "bottle", "phone"]
LABELS += ["hat", "tree", "bird", "ball", "lion", "laptop", "keyboard", "shoe", "bag", "clock"]
PHOTOGRAPHS = sorted((Path(__file__).resolve().parents[2] / "demo" / "examples").glob("*.jpg"))
TORCH = {"torch": False, "torch-optimized": True}
# Boxes with lower scores do not move AP50 of 80 labels.
LOWEST = 0.02
THRESHOLD, PIXELS = 0.3, 2


def open_detector(name, threads):
    """Return the detector of a row: PyTorch, or the torch-free runtime of a folder."""
    if name in TORCH:
        import torch

        from gdino_hf import Detector

        torch.set_num_threads(threads)
        return Detector("nano", device="cpu", optimize=TORCH[name])
    from gdino_hf.runtime import Detector

    return Detector(name, threads=threads)


def latency(name, threads, repeats):
    """Return the median seconds of a photograph."""
    detector = open_detector(name, threads)
    for path in PHOTOGRAPHS:
        detector(path, LABELS)
    seconds = []
    for _ in range(repeats):
        for path in PHOTOGRAPHS:
            start = time.perf_counter()
            detector(path, LABELS)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def ap50(name, threads, data, pictures, save):
    """Return AP50 on the first pictures of a COCO file, and save the detections."""
    from gdino_hf.evaluation.box_map import evaluate_boxes

    content = json.loads(Path(data).read_text())
    labels = [category["name"] for category in content["categories"]]
    places = {category["id"]: place for place, category in enumerate(content["categories"])}
    detector = open_detector(name, threads)
    found, truth = [], []
    for image in content["images"][:pictures]:
        result = detector(Path(data).parent / "images" / image["file_name"], labels, threshold=LOWEST, score="mean")
        found.append(
            {
                "boxes": np.asarray(result.boxes).tolist(),
                "scores": np.asarray(result.scores).tolist(),
                "labels": [labels.index(label) for label in result.text_labels],
            }
        )
        mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        truth.append(
            {
                "boxes": [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)],
                "labels": [places[a["category_id"]] for a in mine],
                "crowd": [bool(a.get("iscrowd", 0)) for a in mine],
                "area": [a["area"] for a in mine],
            }
        )
    Path(save).write_text(json.dumps(found))
    return evaluate_boxes(found, truth).summary()["AP50"]


def boxes_kept(found, expected, lowest):
    """Return the share of expected detections from 0.3 on that a row has with a score from `lowest` on."""
    kept = []
    for own, other in zip(found, expected, strict=True):
        boxes, scores, labels = (np.array(own[key]) for key in ("boxes", "scores", "labels"))
        for box, score, label in zip(other["boxes"], other["scores"], other["labels"], strict=True):
            if score >= THRESHOLD:
                same = (labels == label) & (scores >= lowest)
                away = np.abs(boxes.reshape(-1, 4) - box).max(1)
                kept.append((same & (away <= PIXELS)).any())
    return np.mean(kept), len(kept)


def size_of(name):
    """Return the bytes of the model's files."""
    if name in TORCH:
        from gdino_hf import NANO

        return (Path(NANO) / "model.safetensors").stat().st_size
    entries = json.loads((Path(name) / "gdino_export.json").read_text())["files"].values()
    return sum(entry["bytes"] for entry in entries)


def in_own_process(*arguments):
    """Run a measurement of this script in a fresh process and return its number."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def processor_name():
    """Return the name of the CPU, with the instructions for int8 that it has."""
    text = Path("/proc/cpuinfo").read_text()
    name = next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    vnni = [flag for flag in ("avx_vnni", "avx512_vnni", "amx_int8") if f" {flag}" in text]
    return f"{name}, {', '.join(vnni) or 'without VNNI'}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", metavar="DIR", help="exported folders, a row each")
    parser.add_argument("--data", help="COCO file with images/ beside it")
    parser.add_argument("--pictures", type=int, help="number of its pictures (default: all)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folders-only", action="store_true", help="leave the rows of PyTorch out")
    parser.add_argument("--no-latency", action="store_true", help="leave the columns of latency out")
    parser.add_argument("--save", default=tempfile.gettempdir(), metavar="DIR", help="where detections are written")
    parser.add_argument("--one", choices=("latency", "ap50"), help="print this number of the first folder and stop")
    args = parser.parse_args()
    if args.one == "latency":
        print(latency(args.folders[0], args.threads[0], args.repeats))
        return
    if args.one == "ap50":
        print(ap50(args.folders[0], args.threads[0], args.data, args.pictures, args.save))
        return
    threads = [] if args.no_latency else args.threads
    print(f"CPU: {processor_name()}")
    columns = [f"ms, {n} thread{'s' if n > 1 else ''}" for n in threads] + ["MB"]
    columns += ["AP50", "boxes kept"] if args.data else []
    print("| model | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in [*(() if args.folders_only else TORCH), *args.folders]:
        cells = [
            f"{1e3 * in_own_process(name, '--one', 'latency', '--threads', n, '--repeats', args.repeats):.0f}"
            for n in threads
        ]
        cells.append(f"{size_of(name) / 1e6:.1f}")
        if args.data:
            save = Path(args.save) / f"{Path(name).name}.json"
            limit = () if args.pictures is None else ("--pictures", args.pictures)
            options = ("--data", args.data, "--threads", args.threads[-1], "--save", save, *limit)
            cells.append(f"{in_own_process(name, '--one', 'ap50', *options):.4f}")
            reference = Path(args.save) / "torch.json"
            if reference.is_file():
                found, expected = (json.loads(path.read_text()) for path in (save, reference))
                (strict, count), (near, _) = (boxes_kept(found, expected, lowest) for lowest in (THRESHOLD, 0.2))
                cells.append(f"{strict:.3f} ({near:.3f}) of {count}")
        print(f"| {Path(name).name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
