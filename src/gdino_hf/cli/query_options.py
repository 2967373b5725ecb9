"""Options of `gdino detect` that say what to look for, and where in a picture: labels or a caption, and tiles."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from typing import Any

from gdino_hf.error_text import reason

from .errors import UsageError
from .inputs import read_labels
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
    """

    labels: list[str]
    negative_labels: list[str]
    caption: str | None = None
    spans: tuple[tuple[int, int], ...] = ()


def add_query(parser: argparse.ArgumentParser) -> None:
    """Declare --labels, --caption, --negative, --tiles and --overlap."""
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument(
        "--labels",
        help='what to look for: "cat, remote control" or "a cat. a remote control."; commas, periods and line breaks '
        'separate labels ("St. Bernard", "3.5 mm jack" and "U.S. flag" stay whole); or @FILE with one label per line',
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
    _check_tiles(args)
    if args.caption is not None:
        return _of_caption(args)
    labels = read_labels(args.labels)
    negative_labels = read_labels(args.negative, "--negative") if args.negative is not None else []
    for label in negative_labels:
        if label in labels:
            raise UsageError(f"{label!r} is in --labels and in --negative; leave it in one of them")
    return Query(labels, negative_labels)


def make_search(args: argparse.Namespace, detector: Any, query: Query) -> Any:
    """Return the `gdino_hf.detection.search.Search` of a run.

    Args:
        args: Options of the command.
        detector: The `gdino_hf.Detector`.
        query: What to look for.

    Raises:
        UsageError: The model cannot read the caption.
    """
    from gdino_hf.model.label_faults import LabelWarning

    options = {"threshold": args.threshold, "text_threshold": args.text_threshold, "nms_threshold": args.nms}
    if query.caption is not None:
        try:
            return detector.caption_search(query.caption, spans=query.spans, **options)
        except ValueError as error:
            raise UsageError(f"--caption: {reason(error)}") from error
    with warnings.catch_warnings():
        # What is odd about the labels was printed before the model was loaded.
        warnings.simplefilter("ignore", LabelWarning)
        return detector.search(
            query.labels,
            negative=query.negative_labels,
            tiles=args.tiles,
            overlap=args.overlap,
            batch_size=args.batch,
            **options,
        )


def settings(args: argparse.Namespace, query: Query) -> dict[str, Any]:
    """Return the settings that the results of a run record, those of unused options left out."""
    found: dict[str, Any] = {"labels": query.labels, "negative_labels": query.negative_labels}
    if query.caption is not None:
        found["caption"] = query.caption
    if args.tiles is not None:
        found |= {"tiles": args.tiles, "overlap": args.overlap}
    return found


def _check_tiles(args: argparse.Namespace) -> None:
    if args.tiles is None:
        if args.overlap is not None:
            raise UsageError("--overlap is for --tiles; give both")
        return
    if args.tiles < _SMALLEST_TILE:
        raise UsageError(f"--tiles {args.tiles} is too small; give at least {_SMALLEST_TILE} pixels")
    args.overlap = _OVERLAP if args.overlap is None else args.overlap
    if args.overlap == 1:
        raise UsageError("--overlap 1 leaves nothing new in a tile; give less than 1")
    if args.caption is not None:
        raise UsageError("--tiles is for --labels; leave it out, and a caption is looked for in the whole picture")


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
