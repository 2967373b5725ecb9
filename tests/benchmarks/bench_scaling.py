"""How time and memory grow with pixels, labels, batch and threads, for the optimized gdino-nano on a CPU.

    python tests/benchmarks/bench_scaling.py [--repeats 5] [--json FILE] [--plot FILE.png]

Every case runs in a process of its own, whose peak of resident memory is read before and after. The first forward of a
case is not timed. Pixels vary with 20 labels and one picture, labels and batch at 320 x 320 pixels. Use it on a machine
that does nothing else: cases are measured one after the other, so other work distorts the comparison between them.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path

SIDES = (320, 480, 640, 800, 1066, 1333)
LABELS = (1, 5, 20, 80, 320, 1203)
BATCHES = (1, 2, 4, 8, 16)
THREADS = (1, 2)


def cases():
    """Yield (axis, value, case), where a case is (side, number of labels, batch)."""
    for side in SIDES:
        yield "side", side, (side, 20, 1)
    for count in LABELS:
        yield "labels", count, (320, count, 1)
    for batch in BATCHES:
        yield "batch", batch, (320, 20, batch)


def measure(case, threads, repeats, queue):
    """Put the median seconds of a call and the peak memory in MB above the loaded model's into a queue."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers.utils import logging

    from gdino_hf import Detector, GDinoImageProcessor

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    side, count, batch = case
    detector = Detector("nano", device="cpu")
    settings = {**detector.processor.image_processor.to_dict(), "size": {"height": side, "width": side}}
    detector.processor.image_processor = GDinoImageProcessor.from_dict(settings)
    noise = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    pictures = [Image.fromarray(each) for each in noise]
    vocabulary = detector.vocabulary([f"thing {number}" for number in range(count)])
    loaded = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        detector(pictures, vocabulary, batch_size=batch)
        seconds.append(time.perf_counter() - start)
    queue.put({"seconds": statistics.median(seconds[1:]), "megabytes": resident("VmHWM") - loaded})


def resident(field):
    """Read a memory field of this process from /proc, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**10


def in_a_process(case, threads, repeats):
    """Measure a case in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(case, threads, repeats, queue))
    process.start()
    value = queue.get()
    process.join()
    return value


def table(rows, threads):
    """Format the rows of all axes as Markdown tables."""
    lines = []
    for axis, unit in (("side", "pixels a side"), ("labels", "labels"), ("batch", "pictures")):
        of_axis = [row for row in rows if row["axis"] == axis]
        if not of_axis:
            continue
        lines += ["", f"| {unit} | " + " | ".join(f"ms, {count} threads | MB" for count in threads) + " |"]
        lines.append("|---|" + "---|---|" * len(threads))
        for value in dict.fromkeys(row["value"] for row in of_axis):
            cells = [row for row in of_axis if row["value"] == value]
            numbers = " | ".join(f"{1e3 * row['seconds']:.0f} | {row['megabytes']:.0f}" for row in cells)
            lines.append(f"| {value} | {numbers} |")
    return "\n".join(lines)


def exponent(rows):
    """Return the slope of log time over log value: 1 is linear."""
    import numpy as np

    slope, _ = np.polyfit(np.log([row["value"] for row in rows]), np.log([row["seconds"] for row in rows]), 1)
    return float(slope)


def plot(rows, file):
    """Draw time over each axis, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for place, axis in enumerate(("side", "labels", "batch")):
        panel = figure.add_subplot(1, 3, place + 1, xlabel=axis, ylabel="seconds", xscale="log", yscale="log")
        for threads in dict.fromkeys(row["threads"] for row in rows):
            part = [row for row in rows if row["axis"] == axis and row["threads"] == threads]
            xs, ys = [row["value"] for row in part], [row["seconds"] for row in part]
            panel.plot(xs, ys, marker="o", label=f"{threads} threads")
        panel.legend()
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument("--axes", nargs="+", default=["side", "labels", "batch"], choices=("side", "labels", "batch"))
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--plot", help="draw them to this file")
    args = parser.parse_args()
    rows = []
    for axis, value, case in cases():
        for threads in args.threads if axis in args.axes else ():
            rows.append({"axis": axis, "value": value, "threads": threads, **in_a_process(case, threads, args.repeats)})
            print(rows[-1], flush=True)
    print(table(rows, args.threads))
    for axis in args.axes:
        for threads in args.threads:
            part = [row for row in rows if row["axis"] == axis and row["threads"] == threads]
            slope = exponent(part) / (2 if axis == "side" else 1)
            print(
                f"time grows as {'pixels' if axis == 'side' else axis} to the power of {slope:.2f}, {threads} threads"
            )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
