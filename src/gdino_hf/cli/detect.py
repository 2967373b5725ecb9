"""Find what the labels name in photographs; write annotated pictures and one JSON file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from .errors import UsageError
from .inputs import ImageInput, collect_images, parse_labels

HELP = "find what the labels name in photographs"
_SAVED_AS_THEY_ARE = (".jpg", ".jpeg", ".png", ".webp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder (with sub-folders), glob or URL")
    parser.add_argument("--labels", required=True, help='"cat, remote control", or @FILE with one label per line')
    parser.add_argument("--negative", metavar="LABELS", help="labels that compete but are left out of the results")
    parser.add_argument("--model", default="nano", help="Hub id, folder or nano (default: %(default)s)")
    parser.add_argument(
        "--threshold", type=_fraction, default=0.3, help="lowest score of a detection, 0..1 (default: %(default)s)"
    )
    parser.add_argument(
        "--text-threshold",
        type=_fraction,
        default=0.25,
        help="lowest score of a prompt token that counts, 0..1 (default: %(default)s)",
    )
    parser.add_argument(
        "--nms",
        type=_fraction,
        metavar="IOU",
        help="drop the lesser of two boxes of a label that overlap more than this",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="default: %(default)s"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("detections"), metavar="DIR", help="annotated pictures (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="the results (default: DIR/detections.json)")


def run(args: argparse.Namespace) -> int:
    """Detect in every image; returns 0, or 1 when an image could not be used.

    The JSON holds "images", each with "image", "width" and "height" (upright, in pixels), "annotated" and "detections"
    of "label", "label_index", "score" and "box" (xyxy in pixels); "failed" with "image" and "error"; and the settings.

    Raises:
        UsageError: The labels, the model, the device or the output folder cannot be used.
    """
    labels = parse_labels(args.labels)
    negative_labels = parse_labels(args.negative, "--negative") if args.negative is not None else []
    images = collect_images(args.images, exclude=args.out)
    json_path = args.json or args.out / "detections.json"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        json_path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the output folder cannot be made ({error}); choose another --out or --json") from error
    report: dict[str, Any] = {
        "model": args.model,
        "labels": labels,
        "negative_labels": negative_labels,
        "threshold": args.threshold,
        "text_threshold": args.text_threshold,
        "nms": args.nms,
        "box_format": "xyxy",
        "images": [],
        "failed": [],
    }
    interrupted = False
    if any(image.error is None for image in images):
        interrupted = _detect_all(args, images, report)
    else:
        for image in images:
            _fail(report, image, image.error)
    _write_json(json_path, report)
    print(_table(report["images"]))
    print(f"\n{_count(report)}\n{json_path}", end="" if report["failed"] else "\n")
    if report["failed"]:
        print(f"  ({len(report['failed'])} of {len(images)} inputs failed, see above)")
    if interrupted:
        return 130
    return 1 if report["failed"] else 0


def _detect_all(args: argparse.Namespace, images: list[ImageInput], report: dict[str, Any]) -> bool:
    """Fill the report image by image; True when the user stopped it."""
    from transformers.utils import logging

    from .detector import Detector

    # Loading a model of two seconds needs no bar of its own, and the one over the images comes after it.
    logging.disable_progress_bar()
    detector = Detector(
        args.model, report["labels"], negative_labels=report["negative_labels"], device=args.device, dtype=args.dtype
    )
    from tqdm import tqdm

    names = _OutputNames(args.out, images)
    try:
        # disable=None: no bar where stderr is not a terminal
        for image in tqdm(images, desc="detect", unit="image", disable=None, leave=False):
            try:
                report["images"].append(_detect_one(args, detector, image, names))
            # Bulk work: whatever is wrong with one image is its own affair, the others go on.
            except Exception as error:
                _fail(report, image, error)
    except KeyboardInterrupt:
        print("stopped; what was done so far is written", file=sys.stderr)
        return True
    return False


def _detect_one(args: argparse.Namespace, detector: Any, image: ImageInput, names: _OutputNames) -> dict[str, Any]:
    from gdino_hf.visualize import draw_detections

    from .detector import read_image

    if image.error is not None:
        raise ValueError(image.error)
    picture = read_image(image.source)
    result = detector(picture, threshold=args.threshold, text_threshold=args.text_threshold, nms_threshold=args.nms)
    target = names(image.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    draw_detections(picture, result).save(target, quality=92)
    detections = [
        {
            "label": label,
            "label_index": int(index),
            "score": round(float(score), 4),
            "box": [round(float(side), 2) for side in box],
        }
        for label, index, score, box in zip(
            result["text_labels"], result["labels"], result["scores"], result["boxes"], strict=True
        )
    ]
    return {
        "image": image.source,
        "width": picture.width,
        "height": picture.height,
        "annotated": str(target),
        "detections": detections,
    }


class _OutputNames:
    """Where each annotated picture goes: never over an input, never twice to one place."""

    def __init__(self, folder: Path, images: list[ImageInput]) -> None:
        self.folder = folder
        self.taken = {os.path.normcase(Path(image.source).resolve()) for image in images}

    def __call__(self, name: str) -> Path:
        path = self.folder / name
        if path.suffix.lower() not in _SAVED_AS_THEY_ARE:
            path = path.with_name(path.name + ".png")
        stem, number = path.stem, 2
        while self._key(path) in self.taken:
            path = path.with_name(f"{stem}-{number}{path.suffix}")
            number += 1
        self.taken.add(self._key(path))
        return path

    @staticmethod
    def _key(path: Path) -> str:
        # lower case: two names that differ only in case are one file on common file systems
        return os.path.normcase(path.resolve()).lower()


def _fail(report: dict[str, Any], image: ImageInput, error: object) -> None:
    """Name a failed input on stderr and in the report, in one line."""
    from tqdm import tqdm

    reason = " ".join(str(error).split()) or type(error).__name__
    report["failed"].append({"image": image.source, "error": reason})
    tqdm.write(f"gdino detect: {image.source}: {reason}", file=sys.stderr)


def _write_json(path: Path, report: dict[str, Any]) -> None:
    """Write the whole file or none: a reader never sees half a report."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _table(images: list[dict[str, Any]]) -> str:
    """One line per detection, and a line for each image without any."""
    rows = [("image", "label", "score", "box (x1 y1 x2 y2)")]
    for image in images:
        for found in image["detections"]:
            box = " ".join(f"{side:.0f}" for side in found["box"])
            rows.append((image["image"], found["label"], f"{found['score']:.2f}", box))
        if not image["detections"]:
            rows.append((image["image"], "-", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    )


def _count(report: dict[str, Any]) -> str:
    detections = sum(len(image["detections"]) for image in report["images"])
    return f"{detections} detections in {len(report['images'])} images"


def _fraction(text: str) -> float:
    """An argparse type: a number in 0..1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value
