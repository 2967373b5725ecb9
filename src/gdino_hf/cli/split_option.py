"""The option of `gdino label` that divides what was found into folders for the trainers of other libraries."""

from __future__ import annotations

import argparse
import sys

from gdino_hf.error_text import reason
from gdino_hf.model.printable import printable

from .errors import OutputError, UsageError
from .numbers import fraction

_LAYOUTS = ("yolo", "coco")
# Pictures that are named one by one on the terminal.
_MOST_NAMED = 10


def add_split(parser: argparse.ArgumentParser) -> None:
    """Declare the option."""
    parser.add_argument(
        "--split",
        type=fraction,
        nargs=3,
        metavar=("TRAIN", "VAL", "TEST"),
        help="at the end, also copy the pictures and their boxes into DIR/split/yolo (as Ultralytics has it) and "
        "DIR/split/coco (as RF-DETR has it), whichever of the two --format names, divided by these shares",
    )


def check_split(args: argparse.Namespace) -> None:
    """Refuse shares that cannot be used before all the work.

    Raises:
        UsageError: They do not add up, or no format of --format has such a folder.
    """
    if args.split is None:
        return
    if isinstance(args.out, str):
        raise UsageError(f"--split writes pictures beside local results, and --out is {args.out}; give a local folder")
    if not any(name in args.format for name in _LAYOUTS):
        raise UsageError("--split divides the formats yolo and coco; name one of them in --format")
    if abs(sum(args.split) - 1) > 1e-6 or not args.split[0]:
        given = " ".join(f"{share:g}" for share in args.split)
        raise UsageError(f"--split {given} does not add up to 1, or leaves nothing for training; give 0.8 0.1 0.1, say")


def write_split_folders(args: argparse.Namespace) -> None:
    """Write the folders of a finished run, and say what is in them.

    Raises:
        OutputError: They cannot be written.
        UsageError: There are too few pictures.
    """
    from gdino_hf.labeling.label_store import LabelStore
    from gdino_hf.labeling.split_folders import split_labels

    for layout in _LAYOUTS:
        if layout not in args.format:
            continue
        folder = args.out / "split" / layout
        try:
            made = split_labels(LabelStore(args.out), folder, layout, args.split, keep_empty=not args.drop_empty)
        except ValueError as error:
            raise UsageError(f"--split: {reason(error)}") from error
        except OSError as error:
            raise OutputError(f"{printable(folder)} cannot be written ({reason(error)})") from error
        for name, why in list(made.left_out.items())[:_MOST_NAMED]:
            print(f"gdino label: {printable(name)} is not in the split: {printable(why)}", file=sys.stderr)
        parts = ", ".join(f"{count:,} for {name}" for name, count in made.pictures.items())
        left_out = f"; {len(made.left_out):,} left out" if made.left_out else ""
        print(f"split: {printable(made.folder)}, {parts}{left_out}")
