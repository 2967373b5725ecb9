"""Compare thresholds per label with the best single threshold, on the pictures of the fit and on others.

    python tests/benchmarks/bench_thresholds.py DATASET [--model nano]

The pictures are halved (every second one); thresholds fitted on each half are judged on the other.
"""

import argparse

import numpy as np

from gdino_hf import Detector, fit_thresholds
from gdino_hf.data.formats import open_dataset
from gdino_hf.detection import thresholds


def judged(detector, rows, fit):
    """Return the mean F1 on rows with the single threshold of a fit and with its thresholds per label."""
    labels = fit.vocabulary.labels
    lowest = fit.vocabulary.with_thresholds(dict.fromkeys(labels, thresholds._LOWEST))
    found, truths, _ = thresholds._detect(detector, rows, lowest, 1)
    counts = np.zeros(len(labels), dtype=np.int64)
    for truth in truths:
        np.add.at(counts, truth.labels[~truth.crowd], 1)
    for limits in (np.full(len(labels), fit.single), fit.vocabulary.thresholds(fit.single).numpy()):
        figures = thresholds._figures(found, truths, limits, counts)
        yield float(np.mean([figures[label][2] for label in np.flatnonzero(counts)]))


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
