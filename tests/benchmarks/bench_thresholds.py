"""Compare thresholds per label with the best single threshold, on the pictures of the fit and on others.

    python tests/benchmarks/bench_thresholds.py DATASET [--model nano]

The pictures are halved (every second one); thresholds fitted on each half are judged on the other.
"""

import argparse

import numpy as np

from gdino_hf import Detector, Vocabulary, fit_thresholds
from gdino_hf.data.formats import open_dataset
from gdino_hf.detection.thresholds import judge_thresholds


def judged(detector, rows, fit):
    """Yield the mean F1 on rows with the single threshold of a fit and with its thresholds per label."""
    for vocabulary in (Vocabulary(fit.vocabulary.labels), fit.vocabulary):
        figures = judge_thresholds(detector, rows, vocabulary, threshold=fit.single)
        yield np.mean([each.f1 for each in figures.values()])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="annotation file or folder, as for gdino eval")
    parser.add_argument("--model", default="nano")
    args = parser.parse_args()
    detector = Detector(args.model)
    rows, names = open_dataset(args.dataset)
    every = [rows[place] for place in range(len(rows))]
    fit = fit_thresholds(detector, every, names)
    print(f"{len(every)} pictures: mean F1 {fit.f1_single:.3f} with {fit.single:g} for all, {fit.f1:.3f} per label")
    for first, second in ((every[0::2], every[1::2]), (every[1::2], every[0::2])):
        single, own = judged(detector, second, fit_thresholds(detector, first, names))
        print(f"fitted on {len(first)}, judged on {len(second)} others: {single:.3f} and {own:.3f}")


if __name__ == "__main__":
    main()
