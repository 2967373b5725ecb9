"""Options that make masks of what was found: the segmenter, and whether boxes are tightened to their masks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from gdino_hf.error_text import reason

from .errors import UsageError

# Formats that hold outlines of masks.
_OUTLINES = ("coco-polygons", "yolo", "labelme")


def add_masks(parser: argparse.ArgumentParser) -> None:
    """Declare --masks and --tighten."""
    parser.add_argument(
        "--masks",
        metavar="MODEL",
        help="also make the mask of each box with this segmenter, a Hub id or folder of SAM, SAM-HQ, SAM 2, SAM 2.1, "
        "SAM 3's tracker or EdgeTAM, such as facebook/sam2.1-hiera-tiny",
    )
    parser.add_argument("--tighten", action="store_true", help="make boxes the bounds of their masks; with --masks")


def check_masks(args: argparse.Namespace, formats: Sequence[str]) -> None:
    """Check --masks and --tighten, and that masks can be written.

    Args:
        args: Options of the command.
        formats: Formats that masks are written in.

    Raises:
        UsageError: They do not go together, or a library is not installed.
    """
    if args.masks is None:
        if args.tighten:
            raise UsageError("--tighten is for --masks; give both")
        return
    check_mask_files("--masks", formats)


def check_mask_files(option: str, formats: Sequence[str] = ()) -> None:
    """Check that masks can be written.

    Args:
        option: Option that makes the masks, for the message.
        formats: Formats that masks are written in.

    Raises:
        UsageError: A library is not installed.
    """
    from gdino_hf.detection.exchange_values import kept_library

    try:
        kept_library("pycocotools", "Masks need", "masks")
        if set(formats) & set(_OUTLINES):
            kept_library("shapely", "Outlines of masks need", "masks")
    except ImportError as error:
        raise UsageError(f"{option}: {reason(error)}") from error


def load_segmenter(args: argparse.Namespace) -> Any:
    """Return the `gdino_hf.segmentation.Segmenter` of the options, None without --masks.

    Raises:
        UsageError: The segmenter or the device cannot be used.
    """
    if args.masks is None:
        return None
    from gdino_hf.detection.loading import usable_device
    from gdino_hf.segmentation import Segmenter

    try:
        place = usable_device(args.device)
    except ValueError as error:
        raise UsageError(f"--{reason(error)}") from error
    try:
        # Only the detector computes with 8-bit integers.
        dtype = "float32" if args.dtype == "int8" else args.dtype
        return Segmenter(args.masks, place, dtype, tighten=args.tighten)
    except ValueError as error:
        raise UsageError(f"--masks: {reason(error)}") from error
