"""Find the objects that labels name in photographs; write annotated pictures and one JSON file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gdino_hf.error_text import reason

from .detector import Detector, add_dtype
from .errors import INTERRUPTED, OutputError, UsageError
from .inputs import ImageInput, collect_images, read_labels
from .numbers import fraction
from .report_file import ReportFile

HELP = "find the objects that labels name in photographs"
TEXT_THRESHOLD = 0.25
_SAVED_AS_THEY_ARE = (".jpg", ".jpeg", ".png", ".webp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder (with its sub-folders), glob or URL")
    parser.add_argument(
        "--labels",
        required=True,
        help='what to look for: "cat, remote control" or "a cat. a remote control."; commas, periods and line breaks '
        'separate labels ("St. Bernard", "3.5 mm jack" and "U.S. flag" stay whole); or @FILE with one label per line',
    )
    parser.add_argument(
        "--negative",
        metavar="LABELS",
        help="labels that compete for boxes but are left out of the results, written as for --labels",
    )
    parser.add_argument(
        "--model", default="nano", help="Hub id, folder, or nano, the built-in model (default: %(default)s)"
    )
    parser.add_argument(
        "--threshold",
        type=fraction,
        default=0.3,
        help="score that a detection must exceed, 0..1 (default: %(default)s)",
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
        help="IoU in 0..1 above which the lower-scoring of two boxes of one label is dropped (default: keep both)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add_dtype(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("detections"),
        metavar="DIR",
        help="folder for the annotated pictures (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="file for the results (default: DIR/detections.json)")


def run(args: argparse.Namespace) -> int:
    """Detect objects in every image and return the exit status: 0, or 1 if an image could not be used.

    The JSON has "images", each with "image", "width" and "height" (upright, in pixels), "annotated" and "detections"
    (each with "label", "label_index", "score", and "box": xyxy in pixels, inside the picture); "failed", each with
    "image" and "error"; "finished", true once all images were processed; and the settings. It is rewritten every few
    seconds during the work.

    Raises:
        UsageError: The labels, the model, the device or the output folder cannot be used.
        OutputError: The results cannot be written any more at the end.
    """
    labels = read_labels(args.labels)
    if args.text_threshold is None:
        # A label's score is that of its best token, so a higher text threshold would override --threshold.
        args.text_threshold = min(TEXT_THRESHOLD, args.threshold)
    negative_labels = read_labels(args.negative, "--negative") if args.negative is not None else []
    for label in negative_labels:
        if label in labels:
            raise UsageError(f"{label!r} is in --labels and in --negative; leave it in one of them")
    left_out: list[str] = []
    images = collect_images(args.images, exclude=args.out, left_out=left_out)
    for line in left_out:
        print(f"gdino detect: {line}", file=sys.stderr)
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
    # If there is no image at all, saying so needs no model.
    detector = _load(args, labels, negative_labels) if any(image.error is None for image in images) else None
    report_file = _prepare_output(args.out, json_path, images)
    report["finished"] = _detect_all(args, detector, images, report, report_file)
    try:
        report_file.write(report)
    except OSError as error:
        raise OutputError(f"{json_path}: the results cannot be written ({reason(error)})") from error
    print(_table(report["images"]))
    print(f"\n{_count(report)}")
    print(f"results: {json_path}")
    if not report["finished"]:
        print("stopped; the results so far are written", file=sys.stderr)
        return INTERRUPTED
    return 1 if report["failed"] else 0


def _load(args: argparse.Namespace, labels: list[str], negative_labels: list[str]) -> Any:
    from transformers.utils import logging

    # The bar over the images is the one to show; transformers' bar for loading weights would only flash by.
    logging.disable_progress_bar()
    return Detector(args.model, labels, negative_labels=negative_labels, device=args.device, dtype=args.dtype)


def _prepare_output(out: Path, json_path: Path, images: list[ImageInput]) -> ReportFile:
    """Check before the work starts that results can be written."""
    if json_path.resolve() in {Path(image.source).resolve() for image in images}:
        raise UsageError(f"--json {json_path} is one of the images; name another file")
    try:
        out.mkdir(parents=True, exist_ok=True)
        return ReportFile(json_path)
    except OSError as error:
        raise UsageError(
            f"the results cannot be written ({reason(error, name_file=True)}); choose another --out or --json"
        ) from error


def _detect_all(
    args: argparse.Namespace, detector: Any, images: list[ImageInput], report: dict[str, Any], report_file: ReportFile
) -> bool:
    """Fill the report image by image; return False if the user stopped it."""
    from tqdm import tqdm

    names = _OutputNames(args.out, images)
    try:
        # disable=None: no bar if stderr is not a terminal
        for image in tqdm(images, desc="detect", unit="image", disable=None, leave=False):
            report_file.write_if_due(report)
            if image.error is not None:
                _fail(report, image, image.error)
                continue
            try:
                report["images"].append(_detect_one(args, detector, image, names))
            # In bulk work a broken image of any kind must not stop the others.
            except Exception as error:
                _fail(report, image, reason(error, name_file=True, most_lines=3))
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
    """Clip a box to its picture; the model may place a side slightly outside."""
    return [round(min(max(float(side), 0.0), limit), 2) for side, limit in zip(box, size * 2, strict=True)]


class _OutputNames:
    """Chooses a path for each annotated picture, never that of an input and never the same one twice."""

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
        # Names that differ only in case are the same file on some file systems.
        return str(path.resolve()).lower()


def _fail(report: dict[str, Any], image: ImageInput, why: str) -> None:
    """Report a failed input on stderr, in one line, and in the JSON."""
    from tqdm import tqdm

    report["failed"].append({"image": image.source, "error": why})
    tqdm.write(f"gdino detect: {image.source}: {why}", file=sys.stderr)


def _table(images: list[dict[str, Any]]) -> str:
    """Format the detections as a table with one line each, and a line for each image without any."""
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
