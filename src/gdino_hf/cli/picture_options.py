"""Options of every subcommand that opens pictures: limits of what is decoded, and the bit depth."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

from gdino_hf.model.picture_limits import MEGABYTE, MEGAPIXEL, PEAK_BYTES_PER_PIXEL, PictureLimits

from .errors import UsageError
from .numbers import positive, positive_number

PICTURE_OPTIONS = {
    "max_megapixels": "GDINO_MAX_MEGAPIXELS",
    "max_megabytes": "GDINO_MAX_MEGABYTES",
    "max_seconds": "GDINO_MAX_SECONDS",
    "bit_depth": "GDINO_BIT_DEPTH",
}
"""Options and the environment variable that each sets, which also reaches data loaders' workers."""


def add_picture_options(parser: argparse.ArgumentParser, absent: str | None = None) -> None:
    """Declare --max-megapixels, --max-megabytes, --max-seconds and --bit-depth.

    Args:
        parser: The subcommand's parser.
        absent: Value of an option that is not given; argparse.SUPPRESS for parsers that write defaults into their help.
    """
    default = PictureLimits()
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--max-megapixels",
        type=positive_number,
        default=absent,
        metavar="N",
        help=f"largest picture to decode, in millions of pixels (default: {default.pixels // MEGAPIXEL}); each million "
        f"takes up to {PEAK_BYTES_PER_PIXEL} MB of memory",
    )
    group.add_argument(
        "--max-megabytes",
        type=positive_number,
        default=absent,
        metavar="N",
        help=f"largest picture file to read (default: {default.bytes // MEGABYTE})",
    )
    group.add_argument(
        "--max-seconds",
        type=positive_number,
        default=absent,
        metavar="N",
        help=f"longest time to decode a picture (default: {default.seconds:g})",
    )
    group.add_argument(
        "--bit-depth",
        type=positive,
        default=absent,
        metavar="BITS",
        help="bits in use of pictures with more than 8, such as 12 for values up to 4095 (default: the smallest of 8, "
        "10, 12, 14 and 16 that holds a picture's largest value)",
    )


@contextmanager
def picture_settings(args: argparse.Namespace) -> Iterator[None]:
    """Put the options into the environment while the subcommand runs.

    Args:
        args: Arguments of the command line; those of a subcommand without these options change nothing.

    Raises:
        UsageError: An environment variable holds no such number.
    """
    given = {variable: getattr(args, option, None) for option, variable in PICTURE_OPTIONS.items()}
    before = {variable: os.environ.get(variable) for variable in given}
    os.environ.update({variable: f"{value:g}" for variable, value in given.items() if value is not None})
    try:
        try:
            PictureLimits.current()
        except ValueError as error:
            raise UsageError(str(error)) from error
        yield
    finally:
        for variable, value in before.items():
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value
