"""Time `gdino detect` over a folder against its model alone, and against decoding and writing alone.

    python tests/benchmarks/bench_detect.py [--images 500] [--repeats 3] [--threads 2] [--batch 1] [--sources FOLDER]
    python tests/benchmarks/bench_detect.py --batches      # the model alone, 1 to 8 images in a forward

The photographs are crops and mirror images of the demo's examples, or of a folder's JPEG files. They are JPEG files,
640 pixels on the long side. The model is loaded once, and the three ways alternate in one process. The model alone runs
on inputs that are in memory, one image in a forward. Decoding and writing alone reads each photograph, draws the
detections that the model finds in it and saves it, in one thread. The ratio to watch is that of detect to the slower of
the two.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gdino_hf import Detector
from gdino_hf.cli import detect, main
from gdino_hf.cli.annotated_files import save_whole
from gdino_hf.cli.inputs import read_image
from gdino_hf.visualize import draw_detections

LABELS = ["cat", "cup", "person", "book", "chair", "table", "dog", "bottle", "plant", "remote control"]
EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "demo" / "examples").glob("*.jpg"))
LONG_SIDE = 640
THRESHOLDS = {"threshold": 0.3, "text_threshold": 0.25}
# Pictures kept in memory for the model alone; it runs over them again and again.
IN_MEMORY = 50


def make_photographs(folder, count, sources):
    """Write photographs that differ in what they show, in size and in orientation."""
    chance = np.random.default_rng(0)
    for number in range(count):
        source = Image.open(sources[number % len(sources)]).convert("RGB")
        width, height = (int(side * chance.uniform(0.6, 1.0)) for side in source.size)
        left, top = (
            int(chance.integers(0, side - part + 1)) for side, part in zip(source.size, (width, height), strict=True)
        )
        picture = source.crop((left, top, left + width, top + height))
        if chance.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        scale = LONG_SIDE / max(picture.size)
        picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:04}.jpg", quality=90)
    return sorted(folder.glob("*.jpg"))


def run_detect(folder, out, batch):
    """Call the command; what it prints is dropped."""
    arguments = ["detect", str(folder), "--labels", ", ".join(LABELS), "--out", str(out), "--restart"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = main([*arguments, *(["--batch", str(batch)] if batch else [])])
    assert status == 0


def run_model(detector, inputs, count):
    """Run the model alone over inputs that are in memory."""
    with torch.inference_mode():
        for number in range(count):
            detector.model(**inputs[number % len(inputs)])


def decode_and_write(paths, found, out):
    """Read, draw and save every photograph in one thread."""
    for number, path in enumerate(paths):
        save_whole(draw_detections(read_image(str(path)), found[number % len(found)]), out / path.name)


def timed(way):
    begin, begin_cpu = time.perf_counter(), time.process_time()
    way()
    return time.perf_counter() - begin, time.process_time() - begin_cpu


def time_batches(detector, paths, repeats):
    """Print what an image costs the model alone in batches of several sizes."""
    images = [read_image(str(path)) for path in paths[:8]]
    batches = {size: detector.processor(images=images[:size], text=[LABELS] * size) for size in (1, 2, 4, 8)}
    seconds = {size: [] for size in batches}
    for _ in range(repeats):
        for size, inputs in batches.items():
            seconds[size].append([each / size for each in timed(lambda: run_model(detector, [inputs], 1))])
    for size, pairs in seconds.items():
        wall, cpu = (1e3 * statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"{size} images in a forward: {wall:7.1f} ms wall, {cpu:7.1f} ms CPU per image")


def main_benchmark():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--sources", type=Path, help="folder of JPEG files to take the photographs from")
    parser.add_argument("--batches", action="store_true", help="time the model alone in batches instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    detector = Detector("nano", device="cpu")
    search = detector.search(LABELS, **THRESHOLDS)
    # Loading the model is not what is measured.
    detect.load_detector = lambda *_, **__: detector
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name) / "photographs", Path(name) / "out"
        folder.mkdir()
        sources = EXAMPLES if args.sources is None else sorted(args.sources.glob("*.jpg"))
        paths = make_photographs(folder, args.images, sources)
        if args.batches:
            time_batches(detector, paths, args.repeats)
            return
        images = [read_image(str(path)) for path in paths[:IN_MEMORY]]
        inputs = [detector.processor(images=image, text=[LABELS]) for image in images]
        found = [search([search.prepare(image)])[0].as_result() for image in images]
        ways = {
            "gdino detect": lambda: run_detect(folder, out, args.batch),
            "model alone": lambda: run_model(detector, inputs, len(paths)),
            "decode and write alone": lambda: decode_and_write(paths, found, out),
        }
        figures = {way: [] for way in ways}
        for _ in range(args.repeats):
            for way, call in ways.items():
                figures[way].append(timed(call))
    rates = {way: statistics.median(len(paths) / wall for wall, _ in pairs) for way, pairs in figures.items()}
    print(f"{len(paths)} photographs, {args.threads} threads, medians of {args.repeats}")
    for way, pairs in figures.items():
        cpu = 1e3 * statistics.median(cpu for _, cpu in pairs) / len(paths)
        print(f"{way:24}{rates[way]:8.2f} images/s{cpu:9.1f} ms CPU per image")
    walls = ([wall for wall, _ in pairs] for pairs in figures.values())
    # Within a round, so that other work on the machine weighs on both sides.
    ratios = [max(model, files) / whole for whole, model, files in zip(*walls, strict=True)]
    print(f"detect against the slower of the two: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main_benchmark()
