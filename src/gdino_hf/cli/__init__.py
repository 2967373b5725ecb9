"""The `gdino` command: one file per verb, each with HELP, add_arguments and run.

Nothing here or at the top of a verb imports torch, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .errors import INTERRUPTED, OutputError, UsageError

VERBS = ("detect", "train", "eval", "convert", "bench", "demo")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command, with a sub-parser for every verb."""
    from gdino_hf import __version__

    parser = argparse.ArgumentParser(
        prog="gdino", description="Open-vocabulary detection: name what you look for, get boxes."
    )
    parser.add_argument("--version", action="version", version=f"gdino {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        verb = import_module(f".{name}", __name__)
        # A verb whose options are declared where torch is needed reads them itself, its --help among them.
        own = getattr(verb, "READS_ITS_OPTIONS", False)
        child = verbs.add_parser(name, help=verb.HELP, description=verb.__doc__, add_help=not own)
        verb.add_arguments(child)
        child.set_defaults(run=verb.run, parser=child, reads_rest=own)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments after the program's name; None takes the process's own.

    Returns:
        The exit status: 0, 1 when an input or the output failed, 2 when the command line cannot be used (then nothing
        was done), 130 when the user stopped it.
    """
    # A stream that the caller closed is one that nobody reads.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  as long-lived as the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    args, rest = build_parser().parse_known_args(argv)
    if rest and not args.reads_rest:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    if hasattr(sys.stdout, "reconfigure"):
        # A label or file name that the terminal's encoding lacks is shown by its codes.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except UsageError as error:
        print(f"{args.parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except OutputError as error:
        print(f"{args.parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # `gdino ... | head` has read enough.
        _discard_stdout()
        return INTERRUPTED
    except OSError as error:
        try:
            # Was it the output, on a full disk for instance, that failed, and not the work?
            print(flush=True)
        except OSError:
            _discard_stdout()
            print(f"{args.parser.prog}: error: the output cannot be written ({error})", file=sys.stderr)
            return 1
        raise


def _discard_stdout() -> None:
    """Let what Python still flushes at exit go nowhere, where it would fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
