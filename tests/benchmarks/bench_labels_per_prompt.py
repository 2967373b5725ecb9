"""Measure how much the number of labels that share a prompt moves scores and accuracy.

    python tests/benchmarks/bench_labels_per_prompt.py DATASET [--model nano] [--limit 60] [--numbers 80 20 5 1]

Every number is compared with the first. The change of a label's highest score in a picture is listed for labels that
are in the picture and for those that are not.
"""

import argparse
import time

import numpy as np

from gdino_hf import Detector, Vocabulary
from gdino_hf.data.formats import open_dataset
from gdino_hf.evaluation.box_map import evaluate_boxes


def detect(detector, rows, vocabulary):
    """Return the detections of each picture as `evaluate_boxes` takes them, and the presence of each label in each."""
    predictions, presence = [], []
    options = {"threshold": 0.0, "multi_label": True, "top_k": 300}
    for _, found in detector.stream((row["image"] for row in rows), vocabulary, **options):
        predictions.append({"boxes": found.boxes, "scores": found.scores, "labels": found.labels})
        presence.append([found.presence[label] for label in vocabulary.labels])
    return predictions, np.array(presence)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="annotation file or folder, as for gdino eval")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--limit", type=int, default=60, help="number of pictures (default: %(default)s)")
    parser.add_argument("--numbers", type=int, nargs="+", default=[80, 20, 5, 1], help="labels per prompt")
    args = parser.parse_args()
    detector = Detector(args.model)
    every, names = open_dataset(args.dataset, log=False)
    rows = [every[place] for place in range(min(args.limit, len(every)))]
    truths = [{"boxes": row["boxes"], "labels": [names.index(name) for name in row["names"]]} for row in rows]
    is_there = np.array([[name in row["names"] for name in names] for row in rows])
    first = None
    print(f"{len(rows)} pictures, {len(names)} labels")
    print("labels per prompt  prompts  AP50   AP     change if there  if not there  above 0.3 if not there  seconds")
    for number in args.numbers:
        vocabulary = detector.vocabulary(Vocabulary(names, labels_per_prompt=number))
        start = time.perf_counter()
        predictions, presence = detect(detector, rows, vocabulary)
        seconds = time.perf_counter() - start
        figures = evaluate_boxes(predictions, truths).summary()
        first = presence if first is None else first
        change = np.abs(presence - first)
        print(
            f"{number:17}  {len(vocabulary.encoded.features):7}  {figures['AP50']:.3f}  {figures['AP']:.3f}  "
            f"{change[is_there].mean():15.3f}  {change[~is_there].mean():12.3f}  "
            f"{(presence[~is_there] > 0.3).mean():22.4f}  {seconds:7.0f}"
        )


if __name__ == "__main__":
    main()
