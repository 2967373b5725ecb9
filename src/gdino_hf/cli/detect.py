"""Find what the labels name in photographs; write annotated pictures and one JSON file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .detector import Detector, add_dtype
from .errors import INTERRUPTED, OutputError, UsageError
from .inputs import ImageInput, collect_images, read_labels
from .numbers import fraction
from .report_file import ReportFile

HELP = "find what the labels name in photographs"
TEXT_THRESHOLD = 0.25
_SAVED_AS_THEY_ARE = (".jpg", ".jpeg", ".png", ".webp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder (with sub-folders), glob or URL")
    parser.add_argument(
        "--labels",
        required=True,
        help='"cat, remote control", "a cat. a remote control.", or @FILE with one label per line; without a comma, '
        'periods part labels only if the text ends in one: "a cat. a dog" is one label, as "St. Bernard" is',
    )
    parser.add_argument("--negative", metavar="LABELS", help="labels that compete but are left out of the results")
    parser.add_argument("--model", default="nano", help="Hub id, folder or nano (default: %(default)s)")
    parser.add_argument(
        "--threshold", type=fraction, default=0.3, help="lowest score of a detection, 0..1 (default: %(default)s)"
    )
    parser.add_argument(
        "--text-threshold",
        type=fraction,
        help=f"lowest score of a label's best token, 0..1 (default: {TEXT_THRESHOLD}, or --threshold if lower)",
    )
    parser.add_argument(
        "--nms",
        type=fraction,
        metavar="IOU",
        help="drop the lesser of two boxes of a label whose IoU is above this, 0..1",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add_dtype(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("detections"), metavar="DIR", help="annotated pictures (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="the results (default: DIR/detections.json)")


def run(args: argparse.Namespace) -> int:
    """Detect in every image; returns 0, or 1 when an image could not be used.

    The JSON holds "images", each with "image", "width" and "height" (upright, in pixels), "annotated" and "detections"
    of "label", "label_index", "score" and "box" (xyxy in pixels, inside the picture); "failed" with "image" and
    "error"; "finished", true once every image had its turn; and the settings. It is written as the work goes on.

    Raises:
        UsageError: The labels, the model, the device or the output folder cannot be used.
        OutputError: The results could be written at the beginning, but not at the end.
    """
    labels = read_labels(args.labels)
    if args.text_threshold is None:
        # A label scores what its best token does: left at its default, this would undo a lower --threshold.
        args.text_threshold = min(TEXT_THRESHOLD, args.threshold)
    negative_labels = read_labels(args.negative, "--negative") if args.negative is not None else []
    for label in negative_labels:
        if label in labels:
            raise UsageError(f"{label!r} stands in --labels and in --negative; leave it in one of them")
    images = collect_images(args.images, exclude=args.out)
    json_path = args.json or args.out / "detections.json"
    report: dict[str, Any] = {
        "model": args.model,
        "labels": labels,
        "negative_labels": negative_labels,
        "threshold": args.threshold,
        "text_threshold": args.text_threshold,
        "nms": args.nms,
        "box_format": "xyxy",
        "finished": False,
        "images": [],
        "failed": [],
    }
    # Without an image to look at, a model need not be loaded to say so.
    detector = _load(args, labels, negative_labels) if any(image.error is None for image in images) else None
    report_file = _prepare_output(args.out, json_path, images)
    report["finished"] = _detect_all(args, detector, images, report, report_file)
    try:
        report_file.write(report)
    except OSError as error:
        raise OutputError(f"{json_path}: the results cannot be written ({error})") from error
    print(_table(report["images"]))
    print(f"\n{_count(report)}")
    print(f"results: {json_path}")
    if not report["finished"]:
        print("stopped; what was done so far is written", file=sys.stderr)
        return INTERRUPTED
    return 1 if report["failed"] else 0


def _load(args: argparse.Namespace, labels: list[str], negative_labels: list[str]) -> Any:
    from transformers.utils import logging

    # Loading a model of two seconds needs no bar of its own, and the one over the images comes after it.
    logging.disable_progress_bar()
    return Detector(args.model, labels, negative_labels=negative_labels, device=args.device, dtype=args.dtype)


def _prepare_output(out: Path, json_path: Path, images: list[ImageInput]) -> ReportFile:
    """Find out before the work, not after it, whether results can be written."""
    if json_path.resolve() in {Path(image.source).resolve() for image in images}:
        raise UsageError(f"--json {json_path} is one of the images; name another file")
    try:
        out.mkdir(parents=True, exist_ok=True)
        return ReportFile(json_path)
    except OSError as error:
        raise UsageError(f"the results cannot be written ({error}); choose another --out or --json") from error


def _detect_all(
    args: argparse.Namespace, detector: Any, images: list[ImageInput], report: dict[str, Any], report_file: ReportFile
) -> bool:
    """Fill the report image by image; False when the user stopped it."""
    from tqdm import tqdm

    names = _OutputNames(args.out, images)
    try:
        # disable=None: no bar where stderr is not a terminal
        for image in tqdm(images, desc="detect", unit="image", disable=None, leave=False):
            report_file.write_if_due(report)
            if image.error is not None:
                _fail(report, image, image.error)
                continue
            try:
                report["images"].append(_detect_one(args, detector, image, names))
            # Bulk work: whatever is wrong with one image is its own affair, the others go on.
            except Exception as error:
                _fail(report, image, error)
    except KeyboardInterrupt:
        return False
    return True


def _detect_one(args: argparse.Namespace, detector: Any, image: ImageInput, names: _OutputNames) -> dict[str, Any]:
    from gdino_hf.visualize import draw_detections

    from .detector import read_image

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
            "box": _inside(box, picture.size),
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


def _inside(box: Any, size: tuple[int, int]) -> list[float]:
    """A box cut at the borders of its picture: the model may place a side a little beyond."""
    return [round(min(max(float(side), 0.0), limit), 2) for side, limit in zip(box, size * 2, strict=True)]


class _OutputNames:
    """Where each annotated picture goes: never over an input, never twice to one place."""

    def __init__(self, folder: Path, images: list[ImageInput]) -> None:
        self.folder = folder
        self.taken = {self._key(Path(image.source)) for image in images}

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
        # Two names that differ only in case are one file on common file systems.
        return str(path.resolve()).lower()


def _fail(report: dict[str, Any], image: ImageInput, error: object) -> None:
    """Name a failed input on stderr and in the report, in one line."""
    from tqdm import tqdm

    reason = " ".join(str(error).split()) or type(error).__name__
    report["failed"].append({"image": image.source, "error": reason})
    tqdm.write(f"gdino detect: {image.source}: {reason}", file=sys.stderr)


def _table(images: list[dict[str, Any]]) -> str:
    """One line per detection, and a line for each image without any."""
    rows = [("image", "label", "score", "box (x1 y1 x2 y2)")]
    for image in images:
        for found in image["detections"]:
            box = " ".join(str(round(side)) for side in found["box"])
            rows.append((image["image"], found["label"], f"{found['score']:.2f}", box))
        if not image["detections"]:
            rows.append((image["image"], "-", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    )


def _count(report: dict[str, Any]) -> str:
    done, failed = len(report["images"]), len(report["failed"])
    detections = sum(len(image["detections"]) for image in report["images"])
    count = f"{detections} detection{'s' * (detections != 1)} in {done} image{'s' * (done != 1)}"
    return f"{count}; {failed} input{'s' * (failed != 1)} failed, see above" if failed else count
