"""Find the objects that labels name in photographs; write annotated pictures and one JSON file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gdino_hf.error_text import reason
from gdino_hf.model.printable import printable
from gdino_hf.whole_files import make_folder, remove_empty

from .detect_stages import detect_all
from .errors import INTERRUPTED, OutputError, UsageError
from .format_option import FormatFiles, add_format
from .inputs import ImageInput, collect_images
from .mask_options import add_masks, check_masks, load_segmenter
from .model_options import add_dtype, load_detector
from .numbers import fraction, local_path, positive
from .progress_file import ProgressFile, folder_stamp
from .query_options import Query, add_nms, add_query, make_search, read_query, settings
from .report_file import ReportFile

HELP = "find the objects that labels name in photographs"
TEXT_THRESHOLD = 0.25
# Unless the user chooses: on a CPU, of small pictures of one size only.
_BATCH = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder (with its sub-folders), glob or URL")
    add_query(parser)
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
        help=f"lowest score of a label's best token, 0..1 (default: {TEXT_THRESHOLD}, or a lower threshold of a label)",
    )
    add_nms(parser)
    add_masks(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add_dtype(parser)
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="most images in a forward pass, next to each other and of like sizes (default: 4, on a CPU only small "
        "ones of equal sizes)",
    )
    parser.add_argument(
        "--out",
        type=local_path,
        default=Path("detections"),
        metavar="DIR",
        help="folder for the annotated pictures (default: %(default)s)",
    )
    add_format(parser)
    parser.add_argument(
        "--json", type=local_path, metavar="PATH", help="file for the results (default: DIR/detections.json)"
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="start from zero; otherwise the same command goes on with a run that was stopped or killed",
    )


def run(args: argparse.Namespace) -> int:
    """Detect objects in every image and return the exit status: 0, or 1 if an image could not be used.

    The JSON has "images", each with "image", "width" and "height" (upright, in pixels), "annotated", "presence" (the
    highest score of each label, found or not) and "detections" (each with "label", "label_index", "score", and "box":
    xyxy in pixels, inside the picture; with --caption also "spans", the phrase's characters, and "token_scores"; with
    --masks also "mask", COCO's run lengths);
    "failed", each with "image" and "error"; "finished", true once all images were processed; and the settings. It is
    rewritten every few seconds during the work.

    Raises:
        UsageError: The labels, the caption, the model, the device or the output folder cannot be used.
        OutputError: The results cannot be written any more.
    """
    query = read_query(args)
    if args.text_threshold is None:
        # A label's score is that of its best token, so a higher text threshold would override --threshold.
        args.text_threshold = min(TEXT_THRESHOLD, query.lowest_threshold(args.threshold))
    check_masks(args, args.format)
    left_out: list[str] = []
    images = collect_images(args.images, exclude=args.out, left_out=left_out)
    for line in left_out:
        print(f"gdino detect: {line}", file=sys.stderr)
    json_path = args.json or args.out / "detections.json"
    report: dict[str, Any] = {
        "model": args.model,
        **settings(args, query),
        "threshold": args.threshold,
        "text_threshold": args.text_threshold,
        "nms": args.nms,
        "box_format": "xyxy",
        **({} if args.masks is None else {"masks": args.masks, "tighten": args.tighten}),
        "finished": False,
        "images": [],
        "failed": [],
    }
    format_files = FormatFiles(args.format, args.out, query.labels)
    progress, earlier = _earlier_progress(args, json_path, report, images)
    # If there is no image to detect anything in, saying so needs no model.
    to_do = any(image.error is None and image.source not in earlier for image in images)
    search, may_pad = None, True
    if to_do:
        detector = _load(args, query)
        may_pad = args.batch is not None or detector.device.type != "cpu"
        # Tiles are large, and a batch of them would need memory without saving time on a CPU.
        search = make_search(args, detector, query, tiles_at_once=args.batch or (_BATCH if may_pad else 1))
    report_file = _prepare_output(args.out, json_path, images)
    written: list[str] = []
    try:
        most = args.batch or _BATCH
        report["finished"] = detect_all(
            args.out, search, images, earlier, report, report_file, progress, batch=most, may_pad=may_pad
        )
        report_file.write(report)
        if report["finished"]:
            written = format_files.write(report)
    except OSError as error:
        raise OutputError(
            f"{json_path}: the results cannot be written ({reason(error, name_file=True)}); make room and repeat the "
            "command, which goes on where it stopped"
        ) from error
    finally:
        progress.close(finished=False)
    if report["finished"]:
        progress.close(finished=True)
    print(_table(report["images"]))
    print(f"\n{_count(report)}")
    print("\n".join([f"results: {printable(json_path)}", *written]))
    if not report["finished"]:
        print("stopped; the results so far are written, and the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    return 1 if report["failed"] else 0


def _earlier_progress(
    args: argparse.Namespace, json_path: Path, report: dict[str, Any], images: list[ImageInput]
) -> tuple[ProgressFile, dict[str, dict[str, Any]]]:
    """Return the progress file and the results, by image, that an unfinished run of this command left in it."""
    kept = {name: value for name, value in report.items() if name not in ("finished", "images", "failed")}
    kept |= {"out": str(args.out.resolve()), "dtype": args.dtype, "bit_depth": args.bit_depth}
    kept["model_files"] = folder_stamp(args.model)
    if args.masks is not None:
        kept["masks_files"] = folder_stamp(args.masks)
    progress = ProgressFile(json_path.with_name(json_path.name + ".progress"), kept)
    if args.restart:
        progress.forget()
    if progress.had_other_settings:
        print("gdino detect: an unfinished run with other settings is replaced", file=sys.stderr)
    earlier = {image.source: result for image in images if (result := progress.result(image.source)) is not None}
    if earlier:
        done = f"{len(earlier)} of {len(images)} images are done"
        print(f"gdino detect: an unfinished run goes on, {done}; --restart starts from zero", file=sys.stderr)
    return progress, earlier


def _load(args: argparse.Namespace, query: Query) -> Any:
    from transformers.utils import logging

    # The bar over the images is the one to show; transformers' bar for loading weights would only flash by.
    logging.disable_progress_bar()
    segmenter = load_segmenter(args)
    detector = load_detector(args.model, query.vocabulary(), device=args.device, dtype=args.dtype)
    detector.segmenter = segmenter
    return detector


def _prepare_output(out: Path, json_path: Path, images: list[ImageInput]) -> ReportFile:
    """Check before the work starts that results can be written."""
    if json_path.resolve() in {Path(image.source).resolve() for image in images}:
        raise UsageError(f"--json {json_path} is one of the images; name another file")
    made: list[Path] = []
    try:
        made = make_folder(out)
        return ReportFile(json_path)
    except OSError as error:
        remove_empty(made)
        raise UsageError(
            f"the results cannot be written ({reason(error, name_file=True)}); choose another --out or --json"
        ) from error


def _table(images: list[dict[str, Any]]) -> str:
    """Format the detections as a table with one line each, and a line for each image without any."""
    rows = [("image", "label", "score", "box (x1 y1 x2 y2)")]
    for image in images:
        for found in image["detections"]:
            box = " ".join(str(round(side)) for side in found["box"])
            rows.append((printable(image["image"]), printable(found["label"]), f"{found['score']:.2f}", box))
        if not image["detections"]:
            rows.append((printable(image["image"]), "-", "", ""))
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
