"""Access to a private attribute of argparse, the only one that this package reads.

argparse has no public list of a parser's options. `_option_string_actions` has this name and meaning in Python 3.10 to
3.13 (tried with 3.11). Without it, `gdino train --config` and `--resume` would raise AttributeError; its flags and all
other verbs would keep working.
"""

from __future__ import annotations

import argparse


def long_options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return the parser's long options by their names without the leading dashes.

    Args:
        parser: Any parser.

    Returns:
        The options; an option with several names appears under each.
    """
    return {flag[2:]: action for flag, action in parser._option_string_actions.items() if flag.startswith("--")}
