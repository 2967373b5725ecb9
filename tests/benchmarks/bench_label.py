"""Speed of bulk labelling: one worker against `Detector`'s own loop, and two workers against one; memory on request.

    python tests/benchmarks/bench_label.py --pictures 120 --model nano
    python tests/benchmarks/bench_label.py --memory 20000
    python tests/benchmarks/bench_label.py --soak 2000 --kills 20

Times do not contain loading the model: each run is timed from its first finished picture to its last.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

from gdino_hf import Detections, Detector
from gdino_hf.labeling.label_progress import LabelProgress
from gdino_hf.labeling.label_run import label_pictures
from gdino_hf.labeling.label_settings import LabelJob

LABELS = "cat, person, cup, car, dog, bicycle, chair, bottle"
EXAMPLES = Path(__file__).resolve().parents[2] / "demo" / "examples"


class Timed(LabelProgress):
    """Notes when pictures are finished."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def add(self, tally) -> None:
        super().add(tally)
        self.times += [time.perf_counter()] * tally.pictures

    def rate(self, skip: int) -> float:
        return (len(self.times) - skip) / (self.times[-1] - self.times[skip - 1])


def copies(folder: Path, number: int) -> Path:
    """Fill a folder with links to the example photographs."""
    files = sorted(EXAMPLES.glob("*.jpg"))
    for index in range(number):
        place = folder / f"{index // 1000:03d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index:06d}.jpg").symlink_to(files[index % len(files)])
    return folder


def loop_rate(model: str, paths: list[str], skip: int) -> float:
    """Pictures in a second of the Detector's own loop."""
    detector = Detector(model, device="cpu")
    times = []
    for _, found in detector.stream(paths, detector.vocabulary(LABELS), nms_threshold=0.7, readers=2):
        assert isinstance(found, Detections)
        times.append(time.perf_counter())
    return (len(times) - skip) / (times[-1] - times[skip - 1])


def label_rate(model: str, folder: Path, workers: int, skip: int) -> float:
    """Pictures in a second of a run of its own."""
    with tempfile.TemporaryDirectory() as out:
        timed = Timed()
        job = LabelJob(model, "cpu", batch_size=4, pad=False, shard_size=12)
        label_pictures([folder], LABELS, Path(out) / "labels", job=job, workers=workers, progress=timed)
        return timed.rate(skip)


def compare(model: str, pictures: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = copies(Path(place) / "pictures", pictures)
        paths = [str(path) for path in sorted(folder.rglob("*.jpg"))]
        skip = max(2, pictures // 10)
        cores = sorted(os.sched_getaffinity(0))
        rates: dict[str, list[float]] = {"loop": [], "one worker": [], "two workers": []}
        for _ in range(rounds):
            # One worker and the loop on one core with one thread; two workers have a core and a thread each.
            os.sched_setaffinity(0, cores[:1])
            torch.set_num_threads(1)
            rates["loop"].append(loop_rate(model, paths, skip))
            rates["one worker"].append(label_rate(model, folder, 1, skip))
            os.sched_setaffinity(0, cores[:2])
            rates["two workers"].append(label_rate(model, folder, 2, skip))
    best = {name: max(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(f"{name}: best {max(values):.2f}, median {statistics.median(values):.2f} images/s")
    print(f"one worker / loop: {best['one worker'] / best['loop']:.3f} (at least 0.93)")
    print(f"two workers / one worker: {best['two workers'] / best['one worker']:.2f} (at least 1.8)")


def memory(model: str, pictures: int) -> None:
    """Label many links and print the memory on the way."""
    with tempfile.TemporaryDirectory() as place:
        folder = copies(Path(place) / "pictures", pictures)
        process, seen = psutil.Process(), []
        stop = threading.Event()
        timed = Timed()

        def watch() -> None:
            while not stop.wait(5):
                seen.append((len(timed.times), process.memory_info().rss / 2**20))
                print(f"{seen[-1][0]:,} pictures: {seen[-1][1]:.0f} MB", flush=True)

        thread = threading.Thread(target=watch)
        thread.start()
        job = LabelJob(model, "cpu", batch_size=4, pad=False)
        label_pictures([folder], LABELS, Path(place) / "out", job=job, progress=timed)
        stop.set()
        thread.join()
    quarter = len(seen) // 4
    print(f"median of the second quarter {statistics.median(m for _, m in seen[quarter : 2 * quarter]):.0f} MB")
    print(f"median of the last quarter {statistics.median(m for _, m in seen[3 * quarter :]):.0f} MB")


def soak(model: str, pictures: int, kills: int, seed: int) -> None:
    """Kill a run at random moments, finish it, and compare it with an unbroken one byte by byte."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        folder = copies(Path(place) / "pictures", pictures)
        for path in chance.sample(sorted(folder.rglob("*.jpg")), pictures // 20):
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content[: len(content) // 3])
        command = [sys.executable, "-m", "gdino_hf", "label", str(folder), "--labels", LABELS, "--model", model]
        command += ["--shard", "25", "--format", "coco", "yolo", "parquet", "--out"]
        whole, out = Path(place) / "whole", Path(place) / "killed"
        begin = time.monotonic()
        subprocess.run([*command, whole], stderr=subprocess.DEVNULL, check=False)
        length = time.monotonic() - begin
        for number in range(kills):
            process = subprocess.Popen([*command, out], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            time.sleep(chance.uniform(0, 2 * length / kills + 10))
            process.kill()
            process.wait()
            shards = len(list(out.glob("shards/*.parquet")))
            print(f"kill {number + 1}: {shards} of {-(-pictures // 25)} shards", flush=True)
        subprocess.run([*command, out], stderr=subprocess.DEVNULL, check=False)
        difference = subprocess.run(["diff", "-r", "-x", ".lock", whole, out], capture_output=True, text=True)
        print("equal byte by byte" if difference.returncode == 0 else difference.stdout)
        shutil.rmtree(place, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--pictures", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, metavar="PICTURES")
    parser.add_argument("--soak", type=int, metavar="PICTURES")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.memory:
        memory(args.model, args.memory)
    elif args.soak:
        soak(args.model, args.soak, args.kills, args.seed)
    else:
        compare(args.model, args.pictures, args.rounds)


if __name__ == "__main__":
    main()
