"""How time and memory grow with pixels, labels, batch and threads, for the optimized gdino-nano on a CPU.

    python tests/benchmarks/bench_scaling.py --json FILE [--seconds 60] [--repeats 5] [--plot FILE.png]

Every case runs in a process of its own, whose peak of resident memory is read before and after. The first forward of a
case is not timed. Pixels vary with 20 labels and one picture, labels and batch at 320 x 320 pixels. Use it on a machine
that does nothing else: cases are measured one after the other, so other work distorts the comparison between them.

Cases whose rows are in the file are not measured again. With `--seconds` no case begins later than that, and the same
command goes on where the last one ended.
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
# Each pair of words is a label of two tokens.
COLOURS = (
    "red green blue black white brown grey pink orange purple yellow golden silver dark bright pale clear wooden metal "
    "glass paper plastic leather old new small big long short round flat empty full clean dirty"
)
THINGS = (
    "cat dog horse bird fish cow bear mouse car bus train boat bike plane chair table bed lamp door window cup plate "
    "bowl knife spoon bottle book phone clock hat shoe bag coat tree flower"
)


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
    labels = [f"{colour} {thing}" for colour in COLOURS.split() for thing in THINGS.split()]
    vocabulary = detector.vocabulary(labels[:count])
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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gdino_hf.detection.detector"])
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

    figure = Figure(figsize=(9, 3), layout="constrained")
    for place, axis in enumerate(("side", "labels", "batch")):
        unit = {"side": "pixels", "labels": "labels", "batch": "pictures in one forward"}[axis]
        panel = figure.add_subplot(1, 3, place + 1, xlabel=unit, xscale="log", yscale="log")
        for threads in dict.fromkeys(row["threads"] for row in rows):
            part = [row for row in rows if row["axis"] == axis and row["threads"] == threads]
            xs = [row["value"] ** (2 if axis == "side" else 1) for row in part]
            ys = [row["seconds"] for row in part]
            panel.plot(xs, ys, marker="o", markersize=4, label="1 thread" if threads == 1 else f"{threads} threads")
        panel.plot(xs, [ys[0] * x / xs[0] for x in xs], color="grey", linestyle=":", label="linear")
        panel.legend(frameon=False)
    figure.axes[0].set_ylabel("seconds")
    figure.savefig(file, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument("--axes", nargs="+", default=["side", "labels", "batch"], choices=("side", "labels", "batch"))
    parser.add_argument("--json", help="write the rows to this file, and leave out cases whose rows it has")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case later than this")
    parser.add_argument("--plot", help="draw them to this file")
    args = parser.parse_args()
    start, file = time.perf_counter(), Path(args.json) if args.json else None
    rows = json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else []
    for axis, value, case in cases():
        for threads in args.threads if axis in args.axes else ():
            place = {"axis": axis, "value": value, "threads": threads}
            if any(place.items() <= row.items() for row in rows) or time.perf_counter() - start > args.seconds:
                continue
            rows.append({**place, **in_a_process(case, threads, args.repeats)})
            print(rows[-1], flush=True)
            if file:
                file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    rows.sort(key=lambda row: (row["axis"], row["value"], row["threads"]))
    print(table(rows, args.threads))
    for axis in args.axes:
        for threads in args.threads:
            part = [row for row in rows if row["axis"] == axis and row["threads"] == threads]
            if len(part) < 2:
                continue
            slope = exponent(part) / (2 if axis == "side" else 1)
            print(
                f"time grows as {'pixels' if axis == 'side' else axis} to the power of {slope:.2f}, {threads} threads"
            )
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
