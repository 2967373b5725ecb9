"""What a verb raises when no input is at fault, but the command line or the output, and how it ends when stopped."""

INTERRUPTED = 130
"""Exit status of a command that the user stopped, as shells have it."""


class UsageError(Exception):
    """The command line cannot be used: the message says what, the limit and the remedy; the exit status is 2."""


class OutputError(Exception):
    """The work is done but its results cannot be written: the message says why; the exit status is 1."""
