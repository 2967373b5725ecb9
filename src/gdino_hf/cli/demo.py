"""Serve the web page: detection, captions, batches, video and comparison, an API for programs, and tools for agents."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import UsageError
from .mask_options import add_masks, check_masks, load_segmenter
from .model_options import add_dtype, load_detector

HELP = "serve the web page"
# The page's code is in the Space's folder: copied into the wheel, or beside src in a checkout.
_PACKAGE = Path(__file__).resolve().parents[1]
# The page offers all formats.
_MASK_FORMATS = ("coco-polygons", "yolo", "labelme")
_FOLDERS = (_PACKAGE / "_demo", _PACKAGE.parents[1] / "demo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    parser.add_argument(
        "--model",
        nargs="+",
        action="extend",
        metavar="MODEL",
        help="Hub ids, folders or nano; the page offers all of them and starts with the first (default: nano)",
    )
    parser.add_argument(
        "--share", action="store_true", help="also serve at a public gradio address, which lasts a week"
    )
    parser.add_argument("--port", type=_port, help="port to serve on (default: the first free one from 7860)")
    parser.add_argument(
        "--fetch-ports",
        type=_port,
        nargs="+",
        default=[],
        metavar="PORT",
        help="ports besides 80 and 443 from which the page may fetch pictures by their web addresses",
    )
    parser.add_argument(
        "--mcp",
        action="store_true",
        help="also offer tools to agents by the Model Context Protocol, at the page's address + gradio_api/mcp/",
    )
    add_masks(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add_dtype(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until the user stops it; return 0.

    Raises:
        UsageError: gradio or, for --mcp, mcp is not installed, a model, the segmenter or the device cannot be used, or
            the port is taken.
    """
    page_class = _page_class()
    if args.mcp and importlib.util.find_spec("mcp") is None:
        raise UsageError('--mcp needs the package mcp; install it with pip install "gdino-hf[demo]"')

    check_masks(args, _MASK_FORMATS)

    detectors: dict[str, Any] = {}
    for model in args.model or ["nano"]:
        detectors[_shown(model, detectors)] = load_detector(model, device=args.device, dtype=args.dtype)
    if args.fetch_ports:
        os.environ["GDINO_DEMO_PORTS"] = " ".join(map(str, args.fetch_ports))
    segmenter = load_segmenter(args)
    segmenters = {} if segmenter is None else {_shown(args.masks, {}): segmenter}
    page = page_class(detectors, segmenters, mcp=args.mcp)
    try:
        page.launch(port=args.port, share=args.share)
    except OSError as error:
        # gradio's own message would name gradio's options instead of ours.
        raise UsageError(f"--port {args.port or 7860} is taken or not allowed here; choose another") from error
    finally:
        page.close()
    return 0


def _page_class() -> Any:
    folder = next((folder for folder in _FOLDERS if (folder / "app.py").is_file()), None)
    if folder is None:
        raise UsageError("the page's folder is missing from this installation; install gdino-hf again")
    sys.path.insert(0, str(folder))
    try:
        return import_module("gdino_demo.page").Page
    except ImportError as error:
        raise UsageError(
            f'the page needs {error.name or "more packages"}; install it with pip install "gdino-hf[demo]"'
        ) from error


def _shown(model: str, taken: dict[str, Any]) -> str:
    """Return the name that visitors see: a Hub id unchanged, a local folder without its path."""
    name = Path(model).resolve().name if Path(model).is_dir() else model
    number = 2
    shown = name
    while shown in taken:
        shown, number = f"{name} ({number})", number + 1
    return shown


def _port(text: str) -> int:
    """Parse a port number."""
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return int(text)
