"""Follow the objects that labels name through a video, a folder of frames, a camera or a stream.

Writes an annotated video with its sound, and the tracks as JSON lines, MOT Challenge, COCO-VID and a table.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gdino_hf.error_text import reason
from gdino_hf.model.printable import printable
from gdino_hf.whole_files import check_writable, make_folder

from .errors import INTERRUPTED, OutputError, UsageError
from .mask_options import add_masks, check_mask_files, check_masks, load_segmenter
from .model_options import add_dtype, load_detector
from .numbers import fraction, local_path, positive, positive_number
from .query_options import Query, add_nms, add_tiles, read_query

HELP = "follow objects through a video, a camera or a stream"
# As in gdino_hf.video, which takes a second to import.
_TRACKERS = ("bytetrack", "ocsort", "sort", "botsort", "cbiou")
_THRESHOLD, _NMS, _PATIENCE, _MOST_BETWEEN = 0.3, 0.7, 1.0, 120
_VIDEO, _SUMMARY = "annotated.mp4", "summary.json"
# Rows of the table that are printed.
_ROWS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help='video, folder of frames, address such as rtsp://camera/1, or "webcam" ("webcam:1" for the second one)',
    )
    parser.add_argument(
        "--labels",
        required=True,
        help='what to look for: "cat, remote control", or @FILE as for gdino detect',
    )
    parser.add_argument(
        "--negative", metavar="LABELS", help="labels that compete for boxes but are left out, written as for --labels"
    )
    parser.add_argument(
        "--model", default="nano", help="Hub id, folder, or nano, the built-in model (default: %(default)s)"
    )
    _add_tracking(parser)
    add_tiles(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add_dtype(parser)
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="frames in one forward pass (default: 4 small ones on a CPU, else 1)",
    )
    parser.add_argument("--start", type=_seconds, default=0.0, metavar="SECONDS", help="where in the video to begin")
    parser.add_argument("--end", type=_seconds, metavar="SECONDS", help="where in the video to stop")
    parser.add_argument(
        "--rate", type=positive_number, metavar="N", help="frames per second of a folder of frames (default: 25)"
    )
    parser.add_argument(
        "--out", type=local_path, default=Path("tracks"), metavar="DIR", help="folder of results (default: %(default)s)"
    )
    add_masks(parser)
    parser.add_argument("--no-video", action="store_true", help="write no annotated video")
    for name, what, points in (("line", "line to count crossings of", 2), ("zone", "polygon to count objects in", 3)):
        example = ",".join(f"X{number},Y{number}" for number in range(1, points + 1))
        parser.add_argument(
            f"--count-{name}",
            type=_points,
            action="append",
            default=[],
            metavar=example + ",..." * (name == "zone"),
            help=f"{what}, in pixels; may be given several times",
        )


def _add_tracking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threshold",
        type=fraction,
        default=_THRESHOLD,
        help="score that a box must exceed to begin a track, 0..1; boxes down to half of it continue one (default: "
        "%(default)s)",
    )
    add_nms(parser, _NMS)
    parser.add_argument(
        "--tracker",
        type=_tracker,
        default=_TRACKERS[0],
        metavar="NAME|MODEL",
        help=f"how boxes become tracks: {', '.join(_TRACKERS)}, or Hub id or folder of a SAM 2 video model, which also "
        "makes masks, in every frame (default: %(default)s)",
    )
    parser.add_argument(
        "--every",
        type=positive,
        default=1,
        metavar="N",
        help=f"run the model on every N-th frame, up to {_MOST_BETWEEN}; a tracker that is a SAM 2 model follows the "
        "objects through those between, others place boxes there (default: every frame)",
    )
    parser.add_argument(
        "--patience",
        type=positive_number,
        default=_PATIENCE,
        metavar="SECONDS",
        help="how long an object that is not found keeps its track (default: %(default)s)",
    )
    parser.add_argument(
        "--state",
        type=local_path,
        metavar="FILE",
        help="file with the tracker's state, which is read if it is there and written at the end: the next part of a "
        "video goes on with the same ids",
    )


def _tracker(text: str) -> str:
    """Check the name of a tracker; a model is checked when it is loaded."""
    if text not in _TRACKERS and "/" not in text and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(
            f"there is no tracker {text!r}; choose {', '.join(_TRACKERS)}, or a Hub id or folder of a SAM 2 video model"
        )
    return text


def _seconds(text: str) -> float:
    """Parse a time in a video."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return number


def _points(text: str) -> tuple[tuple[float, float], ...]:
    """Return the points in "10,20,300,40"."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) < 4 or len(numbers) % 2 or not all(0 <= number < 1e6 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of points such as 10,20,300,40, in pixels from 0 on")
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def run(args: argparse.Namespace) -> int:
    """Track and return the exit status: 0; 1 if the source was damaged or given up.

    Raises:
        UsageError: The source, the labels, the model, the device or the folder cannot be used.
        OutputError: The results cannot be written any more.
    """
    args.caption = None
    query = read_query(args)
    if args.every > _MOST_BETWEEN:
        raise UsageError(f"--every {args.every} is too much; give at most {_MOST_BETWEEN}")
    if any(len(line) != 2 for line in args.count_line):
        raise UsageError("--count-line takes two points: X1,Y1,X2,Y2")
    try:
        import av  # noqa: F401
        import supervision  # noqa: F401
        import trackers  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f'tracking needs {error.name}; pip install "gdino-hf[video]"') from error
    from gdino_hf.video.frame_sources import open_source

    try:
        source = open_source(args.source, rate=args.rate, start=args.start, end=args.end)
    except (ValueError, OSError) as error:
        raise UsageError(reason(error)) from error
    check_masks(args, ())
    follows_masks = args.tracker not in _TRACKERS
    if follows_masks and args.masks is not None:
        raise UsageError("--tracker with a model makes the masks, so --masks is not for it; leave one of them out")
    if follows_masks:
        check_mask_files("--tracker")
    _check_output(args)
    try:
        return _track(args, query, source)
    except OSError as error:
        raise OutputError(
            f"{args.out}: the results cannot be written ({reason(error, name_file=True)}); make room and repeat the "
            "command"
        ) from error


def _check_output(args: argparse.Namespace) -> None:
    """Make the folder of results, and refuse to write over the source."""
    if Path(args.source).resolve() == (args.out / _VIDEO).resolve():
        raise UsageError(f"the results would replace {args.source}; choose another --out")
    try:
        make_folder(args.out)
    except OSError as error:
        raise UsageError(
            f"the results cannot be written ({reason(error, name_file=True)}); choose another --out"
        ) from error
    if args.state is None:
        return
    try:
        check_writable(args.state)
    except OSError as error:
        raise UsageError(
            f"the tracker's state cannot be written ({reason(error, name_file=True)}); choose another --state"
        ) from error


def _track(args: argparse.Namespace, query: Query, source: Any) -> int:
    from transformers.utils import logging

    from gdino_hf.video.track_run import TrackRun
    from gdino_hf.video.tracked_frames import make_tracker

    logging.disable_progress_bar()
    vocabulary = query.vocabulary()
    try:
        # Only the detector computes with 8-bit integers.
        place = {"device": args.device, "dtype": "float32" if args.dtype == "int8" else args.dtype}
        tracker = _resumed(args, place)
        if tracker is None:
            tracker = make_tracker(
                args.tracker,
                vocabulary,
                source,
                every=args.every,
                threshold=args.threshold,
                patience=args.patience,
                **place,
            )
        detector = load_detector(args.model, vocabulary, device=args.device, dtype=args.dtype)
        detector.segmenter = load_segmenter(args)
        tiles = {} if args.tiles is None else {"tiles": args.tiles, "overlap": args.overlap}
        frames = detector.track(
            source,
            vocabulary,
            tracker=tracker,
            every=args.every,
            batch_size=args.batch,
            nms_threshold=args.nms,
            **tiles,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(reason(error)) from error
    if args.masks is not None and args.every > 1:
        print(
            f"gdino track: masks are made in the frames that the model looks at, one in {args.every}; --every 1, or a "
            "SAM 2 model as the --tracker, makes them in all",
            file=sys.stderr,
        )
    run_of = TrackRun(
        args.out,
        source,
        vocabulary.labels,
        video=None if args.no_video else args.out / _VIDEO,
        lines=args.count_line,
        zones=args.count_zone,
    )
    with _signals() as stop:
        try:
            finished = run_of.write(frames, stop, sys.stderr)
        except ValueError as error:
            raise UsageError(reason(error)) from error
    settings = {"model": args.model, "tracker": tracker.name, "every": args.every, "threshold": tracker.threshold}
    settings |= {} if args.masks is None else {"masks": args.masks, "tighten": args.tighten}
    run_of.summarize(args.out / _SUMMARY, settings, finished)
    if args.state is not None:
        _save_state(args.state, tracker, finished)
    print("\n".join(_report(args, run_of)))
    if source.remark is not None:
        print(f"gdino track: {printable(source.remark)}", file=sys.stderr)
    if not finished:
        print("stopped; the results so far are written", file=sys.stderr)
        return INTERRUPTED
    return 1 if source.remark is not None else 0


def _save_state(path: Path, tracker: Any, finished: bool) -> None:
    """Write the tracker's state, if it belongs to the last frame that was written."""
    if finished:
        tracker.save(path)
        return
    # The tracker is ahead: it may have the next detection already, or have been stopped in the middle of it.
    print(
        f"gdino track: {printable(path)} is not written, because the run was stopped; to go on from somewhere, end a "
        "part there with --end",
        file=sys.stderr,
    )


def _resumed(args: argparse.Namespace, place: dict[str, Any]) -> Any:
    """Return the tracker of --state; None if there is no such file yet.

    Raises:
        ValueError: The file holds no state of such a tracker.
    """
    from gdino_hf.video.mask_tracking import MaskTracker
    from gdino_hf.video.tracking import Tracker

    if args.state is None or not args.state.exists():
        return None
    if args.tracker not in _TRACKERS:
        found: Any = MaskTracker.load(args.state, args.tracker, **place)
    else:
        found = Tracker.load(args.state)
    if (found.name, found.threshold) != (args.tracker, args.threshold):
        print(
            f"gdino track: {printable(args.state)} goes on with its own tracker, {found.name}, and its threshold, "
            f"{found.threshold:g}",
            file=sys.stderr,
        )
    return found


@contextmanager
def _signals() -> Iterator[Any]:
    """Let Ctrl-C and SIGTERM end the run between two frames, so that all files are finished."""
    from gdino_hf.video.track_run import Stop

    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _report(args: argparse.Namespace, run_of: Any) -> list[str]:
    """Return the table of tracks and the lines that tell where everything is."""
    files = run_of.files
    rows = [("track", "label", "first", "last", "frames", "score")]
    tracks = sorted(files.tracks.values(), key=lambda row: row.track_id)
    for row in tracks[:_ROWS]:
        times = f"{row.first_seconds:.2f} s", f"{row.last_seconds:.2f} s"
        rows.append((str(row.track_id), printable(row.label), *times, str(row.frames), f"{row.mean_score:.2f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(tracks) > _ROWS:
        lines.append(f"... and {len(tracks) - _ROWS} more")
    counts = run_of.counts.summary() if run_of.counts is not None else {"lines": [], "zones": []}
    lines += [f"line {number}: {line['in']} in, {line['out']} out" for number, line in enumerate(counts["lines"], 1)]
    lines += [
        f"zone {number}: {zone['objects']} objects, at most {zone['most']} at a time"
        for number, zone in enumerate(counts["zones"], 1)
    ]
    number = len(tracks)
    lines.append(f"\n{number} track{'s' * (number != 1)} in {files.frames} frame{'s' * (files.frames != 1)}")
    lines.append(f"results: {printable(args.out)}")
    return lines
