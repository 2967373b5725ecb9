"""What a verb raises when the command line, not an input, is at fault, and how it ends when it is stopped."""

INTERRUPTED = 130
"""Exit status of a command that the user stopped, as shells have it."""


class UsageError(Exception):
    """The command line cannot be used: the message says what, the limit and the remedy; the exit status is 2."""
