"""What a verb raises when the command line, not an input, is at fault."""


class UsageError(Exception):
    """The command line cannot be used: the message says what, the limit and the remedy; the exit status is 2."""
