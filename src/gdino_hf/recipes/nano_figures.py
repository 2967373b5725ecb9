"""Measure what a gdino-nano promises, one figure after the other, and keep what is measured.

    python -m gdino_hf.recipes.nano_figures runs/gdino-nano --everyday everyday --wild wild \
        --photographs demo/examples --output runs/figures.json

The model is a run, a checkpoint or an export, as in `nano_rating`. A repeated command measures only what is missing;
another model needs another file. About five minutes on one core.

- average_precision: COCO's metrics as in `nano_rating`, with the processor's own suppression of duplicates and with
  every box. AP50 of each name is kept, too; `--names` prints the mean of some.
- threshold: precision and recall of what a `Detector` finds above its default threshold when asked for all names, with
  the processor's own suppression and with every box, as in `gdino detect --nms 1`.
- absent: false boxes in each photograph above the default threshold when ten absent names are asked.
- photographs: the README's pictures asked for their object among ten others.
- wordings: of the boxes that a name finds, the share that another wording of it finds again.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.coco import category_names, read_coco
from ..detection.detection_options import THRESHOLD
from ..detection.detector import Detector
from ..evaluation.box_map import evaluate_boxes
from ..evaluation.coco_results import coco_predictions
from ..evaluation.confusion import pairwise_iou
from ..evaluation.ground_truth import coco_ground_truth
from ..whole_files import write_whole_text
from .mixed_data import weights_digest
from .nano_rating import FIGURES, detect_by_set, model_parser, told_model
from .nano_scores import LOWEST, RIGHT_IOU, judge
from .wordings import SYNONYMS, article, plural

# What the README's pictures show, and what they do not show.
OBJECTS = ("cat", "person", "cup")
DISTRACTORS = ("dog", "car", "chair", "book", "bottle", "television", "tree", "horse", "pizza", "laptop")
SAME_BOX_IOU = 0.7
NUM_ABSENT = 10
SEED = 0


def rate_average_precision(model: Any, processor: Any, sets: Mapping[str, Path], limit: int | None) -> dict[str, Any]:
    """Rate the model on COCO files, suppressing duplicates as its processor does, and with every box.

    The arguments are those of `nano_rating.rate`.

    Returns:
        COCO's metrics by title and way, and "AP50 by name" with that of each annotated name, duplicates suppressed.
    """
    rated: dict[str, Any] = {}
    by_name: dict[str, Any] = {}
    for title, path in sets.items():
        truth = coco_ground_truth(path)
        for way, iou in ((title, None), (f"{title}, every box", 1.0)):
            detections = detect_by_set(model, processor, path, limit=limit, nms_threshold=iou)
            metrics = evaluate_boxes(*truth.paired_with(coco_predictions(detections, truth).images))
            summary = metrics.summary()
            rated[way] = {name: round(summary[name], 4) for name in FIGURES}
            if way == title:
                labels = metrics.per_label().items()
                by_name[title] = {truth.labels[label]: round(each["AP50"], 4) for label, each in labels}
    return {**rated, "AP50 by name": by_name}


def mean_of_names(by_name: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Return the mean AP50 of some names and that of all others.

    Args:
        by_name: AP50 by name.
        names: The names.

    Raises:
        ValueError: A name has no figure.
    """
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ValueError(f"{missing[0]!r} has no box in the photographs; choose names of {', '.join(sorted(by_name))}.")
    others = [value for name, value in by_name.items() if name not in names]
    return {
        "these names": round(float(np.mean([by_name[name] for name in names])), 4),
        "other names": round(float(np.mean(others)), 4) if others else -1.0,
    }


def rate_threshold(detector: Detector, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Tell precision and recall above the default threshold, with all names asked at once."""
    rated = {}
    for way, options in (("as it is", {}), ("every box", {"nms_threshold": 1.0})):
        precision, recall = judge(detector, rows, names, **options).at(THRESHOLD)
        rated[way] = {"precision": round(precision, 4), "recall": round(recall, 4)}
    return rated


def rate_absent(detector: Detector, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """Count boxes above the default threshold in photographs that are asked for names that they do not show."""
    rng, count = random.Random(SEED), 0
    for row in rows:
        absent = [name for name in names if name not in row["names"]]
        count += len(detector(row["image"], rng.sample(absent, min(NUM_ABSENT, len(absent)))))
    return {"boxes per photograph": round(count / max(1, len(rows)), 4)}


def rate_photographs(detector: Detector, folder: Path) -> dict[str, Any]:
    """Ask each of the README's pictures for its object among ten others.

    Args:
        detector: The detector.
        folder: Folder of the pictures, with annotations.json in COCO format.

    Returns:
        By object: score and IoU of its best box, and the number of false boxes above the default threshold.
    """
    rated = {}
    for row in read_coco(folder / "annotations.json", folder):
        for name in set(row["names"]).intersection(OBJECTS):
            true = np.asarray(row["boxes"], dtype=np.float64)[[other == name for other in row["names"]]]
            found = detector(row["image"], [name, *DISTRACTORS], threshold=LOWEST)
            own = found.labels == 0
            overlap = pairwise_iou(found.boxes, true).max(axis=1, initial=0.0)
            best = int(np.where(own, found.scores, -1.0).argmax()) if own.any() else None
            rated[name] = {
                "score": 0.0 if best is None else round(float(found.scores[best]), 4),
                "IoU": 0.0 if best is None else round(float(overlap[best]), 4),
                "false": int(((found.scores > THRESHOLD) & (~own | (overlap < RIGHT_IOU))).sum()),
            }
    return rated


def other_wordings(name: str) -> dict[str, str]:
    """Return a name with an article, in the plural, and as a synonym, where there is one."""
    many, synonyms = plural(name), SYNONYMS.get(name, ())
    found = {"article": f"{article(name)} {name}"} if many is not None else {}
    if many is not None:
        found["plural"] = many
    if synonyms:
        found["synonym"] = synonyms[0]
    return found


def rate_wordings(detector: Detector, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Tell which share of the boxes that names find above the default threshold their other wordings find again.

    Each photograph is asked for its own names and ten absent ones, then for the same with one kind of other wordings of
    its own names. A box is found again if a box of the other wording above the threshold overlaps it by `SAME_BOX_IOU`.
    """
    rng = random.Random(SEED)
    again: dict[str, int] = {}
    count: dict[str, int] = {}
    for row in rows:
        own = list(dict.fromkeys(row["names"]))
        absent = rng.sample([name for name in names if name not in own], min(NUM_ABSENT, len(names) - len(own)))
        if not own:
            continue
        plain = detector(row["image"], [*own, *absent])
        for kind in ("article", "plural", "synonym"):
            asked = [other_wordings(name).get(kind, name) for name in own]
            changed = [place for place, name in enumerate(own) if asked[place] != name]
            if not changed or len({*asked, *absent}) < len(asked) + len(absent):
                continue
            other = detector(row["image"], [*asked, *absent])
            for place in changed:
                mine, theirs = plain.boxes[plain.labels == place], other.boxes[other.labels == place]
                hits = pairwise_iou(mine, theirs).max(axis=1, initial=0.0) >= SAME_BOX_IOU
                again[kind] = again.get(kind, 0) + int(hits.sum())
                count[kind] = count.get(kind, 0) + len(mine)
    return {kind: {"found again": round(again[kind] / max(1, count[kind]), 4), "boxes": count[kind]} for kind in count}


def fingerprint(model: Any, processor: Any) -> str:
    """Return a short name for a model's weights and its processor's suppression."""
    return hashlib.sha256(f"{processor.nms_threshold} {weights_digest(model)}".encode()).hexdigest()[:16]


def measure(path: Path, model: str, tasks: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Measure what a file of figures lacks; it is written after every figure.

    Args:
        path: The json file.
        model: Fingerprint of the model's weights.
        tasks: What to measure, by title.

    Returns:
        The file's content.

    Raises:
        ValueError: The file is about another model.
    """
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"weights": model}
    if content.get("weights") != model:
        raise ValueError(f"{path} holds figures of another model; choose another --output, or delete it.")
    for title, task in tasks.items():
        if title not in content:
            content[title] = task()
            write_whole_text(path, json.dumps(content, indent=2) + "\n")
    return content


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one model and print its figures as json."""
    parser = model_parser(__doc__)
    parser.add_argument("--everyday", required=True, help="folder with val.json and images/, annotated for all names")
    parser.add_argument("--wild", required=True, help="folder with val.json and images/, annotated by set")
    parser.add_argument("--photographs", required=True, help="folder with annotations.json and the README's pictures")
    parser.add_argument("--output", required=True, help="file of the figures")
    parser.add_argument(
        "--names",
        type=lambda text: [name.strip() for name in text.split(",")],
        help="everyday names, with commas, whose mean AP50 is printed beside that of the others",
    )
    parser.add_argument("--limit", type=int, help="photographs per set, for a quick look; use another --output for it")
    options = parser.parse_args(arguments)
    model, processor = told_model(options)
    weights = fingerprint(model, processor)
    detector = Detector(model, processor=processor, device="cpu")
    everyday, wild = (Path(folder) / "val.json" for folder in (options.everyday, options.wild))
    names, limit = category_names(everyday), options.limit
    rows = read_coco(everyday)
    some = [rows[index] for index in range(len(rows) if limit is None else min(limit, len(rows)))]
    sets = {"everyday/val": everyday, "wild/val": wild}
    tasks: dict[str, Callable[[], Any]] = {
        "photographs": lambda: rate_photographs(detector, Path(options.photographs)),
        "average_precision": lambda: rate_average_precision(model, processor, sets, limit),
        "threshold": lambda: rate_threshold(detector, some, names),
        "absent": lambda: rate_absent(detector, some, names),
        "wordings": lambda: rate_wordings(detector, some, names),
    }
    figures = measure(Path(options.output), weights, tasks)
    if options.names:
        means = mean_of_names(figures["average_precision"]["AP50 by name"]["everyday/val"], options.names)
        figures = {**figures, "AP50": means}
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
