"""Convert checkpoints of Grounding DINO, MM-Grounding-DINO, LLMDet and transformers to this package's layout, and back.

The layout of SOURCE is recognized by its keys. TARGET is written completely or not at all.
"""

from __future__ import annotations

import argparse

from gdino_hf.conversion import command
from gdino_hf.conversion.conversion_error import ConversionError

from .errors import UsageError

HELP = "convert checkpoints of other projects, and back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    command.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Convert a checkpoint; return 0, or 1 if the converted folder could not be pushed.

    Raises:
        UsageError: Nothing was converted, because the source, the target or an option cannot be used.
    """
    try:
        return command.run(args)
    except ConversionError as error:
        raise UsageError(str(error).rstrip(".")) from error
