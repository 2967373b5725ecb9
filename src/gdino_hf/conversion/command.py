"""The command line of conversions, shared by `gdino convert` and the scripts in conversion/.

Importing this module does not import torch, so `gdino convert --help` is fast.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..error_text import reason
from ..model.printable import printable
from .conversion_error import ConversionError
from .layouts import LAYOUTS

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def add_arguments(parser: argparse.ArgumentParser, directions: Sequence[str] | None = None) -> None:
    """Add the arguments of a conversion to a parser.

    Args:
        parser: The parser.
        directions: Layouts that `--to-NAME` options are offered for; None offers all.
    """
    directions = list(LAYOUTS) if directions is None else directions
    files = " and ".join(f"--to-{name}" for name in directions if LAYOUTS[name].is_file)
    parser.add_argument("source", metavar="SOURCE", help=".pth or .safetensors file, model folder or Hub id")
    parser.add_argument(
        "target", metavar="TARGET", help="folder to write" + (f"; with {files} a .pth file" if files else "")
    )
    ways = parser.add_mutually_exclusive_group()
    for layout in directions:
        ways.add_argument(
            f"--to-{layout}",
            dest="to",
            action="store_const",
            const=layout,
            help=f"convert from our layout to the layout {layout!r}",
        )
    parser.add_argument(
        "--preset", metavar="NAME", help="refuse a checkpoint whose size is not this preset's: tiny, base, mm-tiny, ..."
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="JSON",
        help='file with settings that the tensors do not show, such as {"text_config": {"num_attention_heads": 4}}',
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH_OR_ID",
        help="folder, vocab.txt or Hub id (default: the source's own, otherwise BERT's uncased one from the Hub)",
    )
    parser.add_argument(
        "--base",
        metavar="PATH_OR_ID",
        help="model that SOURCE, a file or folder of low-rank adapters (LoRA), is merged into (default: the one that "
        "its adapter_config.json names)",
    )
    parser.add_argument("--license", metavar="ID", help="licence of the weights, for the model card")
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default=10**9,
        metavar="SIZE",
        help="largest size of one safetensors file (default: 1GB)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the model that TARGET holds")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the converted folder to this Hub repository")
    parser.add_argument("--verbose", action="store_true", help="list every key in the report")


def run(args: argparse.Namespace, layout: str | None = None) -> int:
    """Convert a checkpoint, print the report, and push the result if asked to.

    Args:
        args: The parsed arguments of `add_arguments`.
        layout: Name of the layout that the source must have; None accepts any.

    Returns:
        Exit status: 0, or 1 if the converted folder could not be pushed.

    Raises:
        ConversionError: Nothing was converted.
    """
    overrides = _overrides(args.config)
    if args.push_to_hub is not None and args.to is not None and LAYOUTS[args.to].is_file:
        raise ConversionError(
            f"--push-to-hub uploads a model folder, not the .pth file of --to-{args.to}; give only one of them."
        )
    from tqdm import tqdm

    from .engine import Options, convert
    from .hub import check_repository, push

    if args.push_to_hub is not None:
        check_repository(args.push_to_hub)
    options = Options(
        preset=args.preset,
        tokenizer=args.tokenizer,
        overrides=overrides,
        licence=args.license,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
        base=args.base,
        # disable=None shows no bar if stderr is not a terminal.
        progress=lambda steps: tqdm(steps, desc="convert", unit="tensor", disable=None, leave=False),
    )
    report = convert(args.source, args.target, layout=layout, to=args.to, options=options)
    print("\n".join(map(printable, report.lines(every_key=args.verbose))))
    for warning in report.warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    if args.push_to_hub is None:
        return 0
    try:
        print(f"pushed: {push(Path(args.target).expanduser(), args.push_to_hub)}")
    except ConversionError as error:
        print(f"{args.target} is converted but not pushed: {error}", file=sys.stderr)
        return 1
    return 0


def main(layout: str, argv: Sequence[str] | None = None, description: str | None = None) -> int:
    """Run one of the scripts in conversion/.

    Args:
        layout: Name of the layout the script is for.
        argv: Arguments after the program's name; None takes those of the process.
        description: Text for --help.

    Returns:
        Exit status: 0, 1 if the folder could not be pushed, 2 if nothing was converted.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, (layout,))
    try:
        return run(parser.parse_args(argv), layout)
    except ConversionError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


def _overrides(path: Path | None) -> dict[str, Any]:
    """Read the JSON file of --config."""
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"--config {path} cannot be read ({reason(error)}); give a JSON file.") from error
    if not isinstance(content, dict):
        raise ConversionError(
            f"--config {path} holds a {type(content).__name__}; give an object with configuration fields."
        )
    return content


def _size(text: str) -> int:
    """Parse a number of bytes, or a number with KB, MB, GB or TB, as an argparse type."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or not (size := int(float(found[1]) * _UNITS[found[2].upper()])):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 500MB or 2GB")
    return size
