"""Numbers and places on the command line: argparse types whose errors name what is accepted."""

from __future__ import annotations

import argparse
from pathlib import Path


def local_path(text: str) -> Path:
    """Return the path of a file or folder to write; an address such as s3://... would become a folder named `s3:`."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is an address, and results are written on this machine: give a local path, and copy them there"
        )
    return Path(text)


def results_place(text: str) -> Path | str:
    """Return where results go: a path, or an address such as s3://bucket/labels."""
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return text if "://" in text else Path(text)


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def fraction(text: str) -> float:
    """Parse a number in 0..1."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def positive_number(text: str) -> float:
    """Return an option's number if it is finite and above 0.

    Args:
        text: Value of the option.

    Returns:
        The number.
    """
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number
