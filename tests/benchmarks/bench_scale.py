"""What a picture costs when there are very many: the model, the list of pictures, and the files at the end.

    python tests/benchmarks/bench_scale.py

The figures of docs/scale.md are from here. The model is timed from its first finished pictures to the last, on one core
and with one thread; the list and the files without a model, on made-up pictures and finds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_label import LABELS, copies, label_rate

from gdino_hf import Detections, Vocabulary
from gdino_hf.labeling.label_results import write_results
from gdino_hf.labeling.label_settings import LabelJob, run_settings
from gdino_hf.labeling.label_store import LabelStore, shard_name
from gdino_hf.labeling.shard_files import LabelRow, encode_shard
from gdino_hf.labeling.shard_plan import shards_per_part, write_plan
from gdino_hf.labeling.sources import Sources

BOXES = 3


def planned(root: Path, number: int) -> float:
    """Pictures in a second that are listed."""
    folder = copies(root / "pictures", number)
    begin = time.perf_counter()
    write_plan(LabelStore(root / "plan"), Sources([str(folder)], root / "plan"), shards_per_part(200) * 200)
    return number / (time.perf_counter() - begin)


def finished(root: Path, number: int, shard: int, formats: list[str]) -> tuple[float, float]:
    """Pictures in a second that the end of a run takes, and bytes of a picture in its shard."""
    store, names = LabelStore(root), tuple(LABELS.split(", "))
    chance = np.random.default_rng(0)
    total = 0
    for place in range(number // shard):
        rows = []
        for index in range(shard):
            corners = np.sort(chance.uniform(0, 600, (BOXES, 2, 2)), axis=1).reshape(BOXES, 4).astype(np.float32)
            source = f"/data/pictures/{place:06d}/{index:06d}.jpg"
            scores, labels = chance.random(BOXES, np.float32), chance.integers(0, len(names), BOXES)
            rows.append(LabelRow(source, Detections(corners, scores, labels, names, (640, 640), source=source)))
        content = encode_shard(rows, names, "0" * 64)
        total += len(content)
        store.write(shard_name(place), content)
    settings = run_settings(LabelJob(), Vocabulary(LABELS), [str(root)], "0" * 64)
    begin = time.perf_counter()
    write_results(store, settings, names, formats)
    return number / (time.perf_counter() - begin), total / number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--pictures", type=int, default=100, help="pictures for the model")
    parser.add_argument("--rows", type=int, default=20_000, help="made-up pictures")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        print(f"list: {planned(root / 'list', args.rows):,.0f} pictures/s")
        for formats in ([], ["coco"]):
            rate, size = finished(root / f"end{len(formats)}", args.rows, 1000, formats)
            print(f"end, {' '.join(formats) or 'no formats'}: {rate:,.0f} pictures/s; {size:.0f} bytes in a shard each")
        rate = label_rate(args.model, copies(root / "photos", args.pictures), 1, max(2, args.pictures // 10))
        print(f"model: {rate:.2f} pictures/s on one core, {1 / rate:.3f} s each")


if __name__ == "__main__":
    main()
