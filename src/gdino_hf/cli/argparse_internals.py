"""What this package uses of argparse that is private: a list of options, and how help texts get their defaults.

argparse has no public list of a parser's options. `_option_string_actions` has this name and meaning in Python 3.10 to
3.13 (tried with 3.11). Without it, `gdino train --config` and `--resume` would raise AttributeError; its flags and all
other verbs would keep working. Without `HelpFormatter._get_help_string`, help texts would have no defaults.
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


class DefaultsInHelp(argparse.ArgumentDefaultsHelpFormatter):
    """A formatter that adds the default to each help text, unless there is none or the text tells it in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None:
            is_option = bool(action.option_strings) and not action.required
            told = action.help is None or "default" in action.help.lower()
            return f"{action.help} (not set by default)" if is_option and not told else action.help
        return super()._get_help_string(action)
