"""Options that say what to look for, and where in a picture: labels or a caption, and tiles."""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdino_hf.error_text import reason
from gdino_hf.model.printable import printable

from .errors import UsageError
from .inputs import label_file, read_labels
from .numbers import fraction, positive

# As gdino_hf.detection.tiles has them, which takes a second to import.
_OVERLAP = 0.25
_SMALLEST_TILE = 32


@dataclass(frozen=True)
class Query:
    """What to look for.

    Attributes:
        labels: Labels, or the phrases of the caption.
        negative_labels: Labels that compete for boxes but are left out of the results.
        caption: The caption; None for labels.
        spans: (start, end) characters of the caption's phrases.
        file: The `gdino_hf.Vocabulary` of a label file with more than one label per line; None without one.
    """

    labels: list[str]
    negative_labels: list[str]
    caption: str | None = None
    spans: tuple[tuple[int, int], ...] = ()
    file: Any = None

    def vocabulary(self) -> Any:
        """Return the labels as a `gdino_hf.Vocabulary`; None for a caption."""
        from gdino_hf import Vocabulary

        if self.caption is not None:
            return None
        return Vocabulary(self.labels, negative=self.negative_labels) if self.file is None else self.file

    def lowest_threshold(self, threshold: float) -> float:
        """Return the lowest score that a detection may have, if labels without a threshold of their own have this."""
        return threshold if self.file is None else float(self.file.thresholds(threshold).min())


def add_query(parser: argparse.ArgumentParser) -> None:
    """Declare --labels, --caption, --negative, --tiles and --overlap."""
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument(
        "--labels",
        help='what to look for: "cat, remote control" or "a cat. a remote control."; commas, periods and line breaks '
        'separate labels ("St. Bernard", "3.5 mm jack" and "U.S. flag" stay whole); or @FILE with one label per line, '
        'with JSON such as {"cat": ["cat", "kitten"]}, or with a vocabulary that Python saved, whose thresholds of '
        "single labels come before --threshold",
    )
    wanted.add_argument(
        "--caption",
        metavar="TEXT",
        help='a sentence such as "a man riding a horse"; the results are the boxes of its noun phrases, each with its '
        "characters in the sentence and the scores of its tokens",
    )
    parser.add_argument(
        "--negative",
        metavar="LABELS",
        help="labels that compete for boxes but are left out of the results, written as for --labels",
    )
    add_tiles(parser)


def add_nms(parser: argparse.ArgumentParser, default: float | None = None) -> None:
    """Add --nms; without a default, the model's processor decides."""
    shown = "as the model's processor says" if default is None else default
    parser.add_argument(
        "--nms",
        type=fraction,
        default=default,
        metavar="IOU",
        help="IoU in 0..1 above which the lower-scoring of two boxes of one label is dropped; 1 keeps both (default: "
        f"{shown})",
    )


def add_tiles(parser: argparse.ArgumentParser) -> None:
    """Declare --tiles and --overlap."""
    parser.add_argument(
        "--tiles",
        type=positive,
        metavar="PIXELS",
        help="also look at overlapping tiles of this side in pictures larger than that, for small objects; an object "
        "that several tiles show is reported once",
    )
    parser.add_argument(
        "--overlap",
        type=fraction,
        help=f"part of a tile's side that it shares with its neighbour, from 0 to below 1 (default: {_OVERLAP})",
    )


def read_query(args: argparse.Namespace) -> Query:
    """Read what to look for, and set `args.overlap`.

    Raises:
        UsageError: A label or the caption cannot be used, or options do not go together.
    """
    check_tiles(args)
    if args.caption is not None:
        return _of_caption(args)
    path = label_file(args.labels)
    if path is not None:
        return _of_file(path, args.negative)
    labels = read_labels(args.labels)
    negative_labels = read_labels(args.negative, "--negative") if args.negative is not None else []
    for label in negative_labels:
        if label in labels:
            raise UsageError(f"{label!r} is in --labels and in --negative; leave it in one of them")
    return Query(labels, negative_labels)


def make_search(args: argparse.Namespace, detector: Any, query: Query, tiles_at_once: int) -> Any:
    """Return the `gdino_hf.detection.search.Search` of a run.

    Args:
        args: Options of the command.
        detector: The `gdino_hf.Detector`.
        query: What to look for.
        tiles_at_once: Most tiles in one forward pass.

    Raises:
        UsageError: The model cannot read the caption, or a saved vocabulary is of another model.
    """
    from gdino_hf.model.label_faults import LabelWarning

    options = {"threshold": args.threshold, "text_threshold": args.text_threshold, "nms_threshold": args.nms}
    tiles = {"tiles": args.tiles, "overlap": args.overlap, "batch_size": tiles_at_once}
    if args.tiles is None:
        tiles = {}
    try:
        # What is odd about the words is printed in one line each; for labels, before the model was loaded.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LabelWarning)
            if query.caption is None:
                return detector.search(query.vocabulary(), **tiles, **options)
            search = detector.caption_search(query.caption, spans=query.spans, **tiles, **options)
        for remark in search.asked.remarks:
            print(f"warning: {printable(remark)}", file=sys.stderr)
        return search
    except ValueError as error:
        raise UsageError(f"--{'labels' if query.caption is None else 'caption'}: {reason(error)}") from error


def settings(args: argparse.Namespace, query: Query) -> dict[str, Any]:
    """Return the settings that the results of a run record, those of unused options left out."""
    found: dict[str, Any] = {"labels": query.labels, "negative_labels": query.negative_labels}
    if query.caption is not None:
        found["caption"] = query.caption
    if query.file is not None:
        found["vocabulary"] = query.file.settings()
    if args.tiles is not None:
        found |= {"tiles": args.tiles, "overlap": args.overlap}
    return found


def check_tiles(args: argparse.Namespace) -> None:
    """Check --tiles and --overlap, and set `args.overlap`.

    Raises:
        UsageError: They cannot be used.
    """
    if args.tiles is None:
        if args.overlap is not None:
            raise UsageError("--overlap is for --tiles; give both")
        return
    if args.tiles < _SMALLEST_TILE:
        raise UsageError(f"--tiles {args.tiles} is too small; give at least {_SMALLEST_TILE} pixels")
    args.overlap = _OVERLAP if args.overlap is None else args.overlap
    if args.overlap == 1:
        raise UsageError("--overlap 1 leaves nothing new in a tile; give less than 1")


def _of_file(path: Path, negative: str | None) -> Query:
    from gdino_hf.detection.label_files import read_label_file

    options = {} if negative is None else {"negative": read_labels(negative, "--negative")}
    try:
        found = read_label_file(path, **options)
    except TypeError as error:
        raise UsageError("--negative is for labels that are not a saved vocabulary; save it with them") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"--labels: {reason(error)}") from error
    return Query(list(found.labels), list(found.negative_labels), file=found)


def _of_caption(args: argparse.Namespace) -> Query:
    from gdino_hf.detection.phrase_grounding import noun_phrases

    if args.negative is not None:
        raise UsageError("--negative is for --labels; leave it out with --caption")
    caption = " ".join(args.caption.split())
    if not caption:
        raise UsageError('--caption is empty; write for instance --caption "a man riding a horse"')
    if any("\ud800" <= character <= "\udfff" for character in caption):
        raise UsageError("--caption holds bytes that are not UTF-8; write it in UTF-8")
    # A caption without a noun phrase is a phrase itself.
    spans = tuple(noun_phrases(caption)) or ((0, len(caption)),)
    return Query(list(dict.fromkeys(caption[start:end] for start, end in spans)), [], caption, spans)
