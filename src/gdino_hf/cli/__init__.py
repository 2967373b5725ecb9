"""The `gdino` command: one file per subcommand, each with HELP, add_arguments and run.

Neither this file nor the top level of a subcommand's file imports torch, so `--help` and usage errors appear at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from gdino_hf.error_text import reason
from gdino_hf.model.printable import printable
from gdino_hf.torch_extra import missing_module, remedy

from .errors import INTERRUPTED, OutputError, UsageError
from .picture_options import add_picture_options, picture_settings
from .terminal import safe_terminal

# `gdino train` declares the options of pictures itself, so that a YAML file can hold them and a run keeps them; bench
# times random pixels, and the page has limits of its own.
_OPENING_PICTURES = ("detect", "label", "track", "eval")
VERBS = ("detect", "label", "track", "train", "eval", "convert", "export", "bench", "demo")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, whatever a shell's pattern expanded to: file names may look like options."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command, with a sub-parser for every subcommand."""
    from gdino_hf import __version__

    parser = _Parser(
        prog="gdino", description="Open-vocabulary detection: name what you are looking for and get its boxes."
    )
    parser.add_argument("--version", action="version", version=f"gdino {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        verb = import_module(f".{name}", __name__)
        # Subcommands whose options are declared in modules that import torch parse their own arguments, including
        # --help.
        own = getattr(verb, "READS_ITS_OPTIONS", False)
        child = verbs.add_parser(name, help=verb.HELP, description=verb.__doc__, add_help=not own, allow_abbrev=not own)
        verb.add_arguments(child)
        if name in _OPENING_PICTURES:
            add_picture_options(child)
        child.set_defaults(run=verb.run, parser=child, reads_rest=own)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments after the program's name (default: those of the process).

    Returns:
        The exit status: 0; 1 if an input or the output failed; 2 if the command line cannot be used, in which case
        nothing was done; 130 if the user stopped the command.
    """
    with safe_terminal():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    args, rest = build_parser().parse_known_args(argv)
    if rest and not args.reads_rest:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    missing = missing_module()
    if missing is not None:
        print(f"{args.parser.prog}: error: {remedy(args.parser.prog, missing)}", file=sys.stderr)
        return 2
    try:
        with picture_settings(args):
            status = args.run(args)
        sys.stdout.flush()
        return status
    except UsageError as error:
        print(f"{args.parser.prog}: error: {printable(error)}", file=sys.stderr)
        return 2
    except OutputError as error:
        print(f"{args.parser.prog}: error: {printable(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reading end of the pipe was closed, as by `gdino ... | head`.
        _discard_stdout()
        return INTERRUPTED
    except OSError as error:
        try:
            # Writing to stdout may have failed, for instance on a full disk, rather than the work itself: try again.
            print(flush=True)
        except OSError:
            _discard_stdout()
            print(
                f"{args.parser.prog}: error: the output cannot be written ({reason(error, name_file=True)})",
                file=sys.stderr,
            )
            return 1
        raise


def _discard_stdout() -> None:
    """Point stdout at the null device, so that Python's flush at exit does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
