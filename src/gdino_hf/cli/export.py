"""Write a model as ONNX, OpenVINO, ExecuTorch or torch.export, in a folder that has everything a runtime needs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gdino_hf.error_text import reason

from .errors import OutputError, UsageError
from .inputs import read_labels
from .numbers import fraction

HELP = "write a model for another runtime"
_WEB = "web"
_FORMATS = ("onnx", "openvino", "executorch", "torch-export", _WEB)
_VARIANTS = ("whole", "split", "baked")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    parser.add_argument("model", metavar="MODEL", help="Hub id, folder or nano")
    parser.add_argument("--format", choices=_FORMATS, default="onnx", help="what to write (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write; only an earlier export is replaced"
    )
    parser.add_argument(
        "--variant",
        choices=_VARIANTS,
        help="whole: one graph from pixels and tokens to boxes; split: a graph for the text and one for the image; "
        "baked: a graph for --labels alone, without a text encoder (default: baked with --labels, else whole)",
    )
    parser.add_argument(
        "--labels",
        help="labels that a baked model finds, or that a page begins with, written as for gdino detect",
    )
    parser.add_argument(
        "--int8", action="store_true", help="write weights in int8, except layers that move boxes; onnx and openvino"
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="folder of pictures on which --int8 compares boxes (default: gdino-nano's three example photographs)",
    )
    parser.add_argument("--threshold", type=fraction, help="score threshold that a page begins with (default: 0.3)")
    parser.add_argument(
        "--npm-folder",
        type=Path,
        metavar="DIR",
        help="folder with a page's npm packages, as npm install lays them out (default: npm fetches them once)",
    )


def run(args: argparse.Namespace) -> int:
    """Export the model and print what was written; return 0.

    Raises:
        UsageError: The model, a label or a combination of options cannot be used.
        OutputError: The folder cannot be written.
    """
    labels = None if args.labels is None else read_labels(args.labels)
    from gdino_hf.detection.loading import LoadingError

    try:
        _export(args, labels)
    except LoadingError as error:
        raise UsageError(f"{args.model} cannot be loaded ({error.why}); give a Hub id, a folder or nano") from error
    except ValueError as error:
        raise UsageError(reason(error)) from error
    except OSError as error:
        raise OutputError(f"--out {args.out} cannot be written ({reason(error)}); choose another folder") from error
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {args.format}, {size / 1e6:.1f} MB")
    return 0


def _export(args: argparse.Namespace, labels: list[str] | None) -> None:
    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    web_only = {"--threshold": args.threshold, "--npm-folder": args.npm_folder}
    if args.format != _WEB:
        given = [option for option, value in web_only.items() if value is not None]
        if given:
            raise UsageError(f"{given[0]} is for --format {_WEB}, not for {args.format}; leave it out")
        from gdino_hf.export import export

        export(
            args.model,
            args.out,
            format=args.format,
            variant=args.variant,
            labels=labels,
            int8=args.int8,
            calibration=args.calibration,
            tell=tell,
        )
        return
    if args.int8 or args.calibration is not None:
        raise UsageError(f"--int8 and --calibration are for onnx and openvino, not for {_WEB}; leave them out")
    if args.variant not in (None, "whole"):
        raise UsageError(f"--variant {args.variant} does not go into a page, which takes any words; leave it out")
    from gdino_hf.export.web_page import export_web

    beginning = {"labels": labels, "threshold": args.threshold}
    given_only = {name: value for name, value in beginning.items() if value is not None}
    export_web(args.model, args.out, npm_folder=args.npm_folder, tell=tell, **given_only)
