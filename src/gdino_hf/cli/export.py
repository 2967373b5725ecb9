"""Write a model as ONNX, OpenVINO, ExecuTorch or torch.export, in a folder that has everything a runtime needs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gdino_hf.error_text import reason

from .errors import OutputError, UsageError
from .inputs import read_labels

HELP = "write a model for another runtime"
_FORMATS = ("onnx", "openvino", "executorch", "torch-export")
_VARIANTS = ("whole", "split", "baked")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    parser.add_argument("model", metavar="MODEL", help="Hub id, folder or nano")
    parser.add_argument("--format", choices=_FORMATS, default="onnx", help="what to write (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, replaced if it exists")
    parser.add_argument(
        "--variant",
        choices=_VARIANTS,
        help="whole: one graph from pixels and tokens to boxes; split: a graph for the text and one for the image; "
        "baked: a graph for --labels alone, without a text encoder (default: baked with --labels, else whole)",
    )
    parser.add_argument("--labels", help="labels that a baked model finds, written as for gdino detect")


def run(args: argparse.Namespace) -> int:
    """Export the model and print what was written; return 0.

    Raises:
        UsageError: The model, a label or a combination of options cannot be used.
        OutputError: The folder cannot be written.
    """
    labels = None if args.labels is None else read_labels(args.labels)
    from gdino_hf.detection.loading import LoadingError
    from gdino_hf.export import export

    try:
        export(
            args.model,
            args.out,
            format=args.format,
            variant=args.variant,
            labels=labels,
            tell=lambda line: print(line, file=sys.stderr),
        )
    except LoadingError as error:
        raise UsageError(f"{args.model} cannot be loaded ({error.why}); give a Hub id, a folder or nano") from error
    except ValueError as error:
        raise UsageError(reason(error)) from error
    except OSError as error:
        raise OutputError(f"--out {args.out} cannot be written ({reason(error)}); choose another folder") from error
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"{args.out}: {args.format}, {size / 1e6:.1f} MB")
    return 0
