"""Errors that end a subcommand, and the exit status of a subcommand that the user stopped."""

INTERRUPTED = 130
"""Exit status of a command that the user stopped: 128 + SIGINT, as in shells."""


class UsageError(Exception):
    """The command line cannot be used; the message names the value, the limit and the remedy. The exit status is 2."""


class OutputError(Exception):
    """The results cannot be written; the message says why. The exit status is 1."""
