"""Format an exception as part of a sentence, for messages that say what went wrong and what to do about it."""

from __future__ import annotations

import sys
from typing import Any
from urllib.error import HTTPError, URLError

from .model.printable import printable

_LONGEST = 400


def __getattr__(name: str) -> Any:
    """CONFIG_ERRORS: the exceptions raised when a configuration is made from values it does not accept."""
    if name != "CONFIG_ERRORS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Imported on demand, because importing the Hub's client takes longer than all of `gdino --help`.
    from huggingface_hub.errors import StrictDataclassError

    return (TypeError, ValueError, StrictDataclassError)


def reason(error: BaseException, *, name_file: bool = False, most_lines: int = 1) -> str:
    """Say in one line, without a period at the end, why something failed.

    Args:
        error: Any exception.
        name_file: Also name the file of an OSError, for messages that do not name it themselves.
        most_lines: Number of lines of a longer message to keep, joined by blanks. For a traceback passed on as a
            message (as a data loader's worker does) and for a configuration's error, it is always the last line, which
            has the cause.

    Returns:
        The gist of the message, or the exception's type if it has no message.
    """
    from PIL import UnidentifiedImageError

    if hasattr(error, "without_name"):
        return printable(error.without_name)
    if isinstance(error, UnidentifiedImageError):
        return "it is not a picture that can be read"
    cause = getattr(error, "reason", None)
    if isinstance(error, OSError) and isinstance(cause, BaseException):
        # A URLError wraps the connection's error, which has the cause.
        return reason(cause, most_lines=most_lines)
    if isinstance(error, URLError) and not isinstance(error, HTTPError) and isinstance(cause, str):
        return printable(cause)
    if isinstance(error, OSError) and error.strerror:
        return printable(f"{error.strerror}: {error.filename}" if name_file and error.filename else error.strerror)
    if isinstance(error, KeyError) and len(error.args) == 1:
        return f"the key {error.args[0]!r} is missing"
    text = str(error)
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()] or [type(error).__name__]
    # Messages such as "Error(s) in loading state_dict for X:" announce the cause, which follows.
    while len(lines) > 1 and lines[0].endswith(":"):
        lines.pop(0)
    cause_is_last = _is_of_a_configuration(error) or "Traceback (most recent call last)" in text
    kept = lines[-1:] if cause_is_last else lines[:most_lines]
    cause = " ".join(kept).removeprefix("ValueError: ").removeprefix("TypeError: ")
    if len(cause) > _LONGEST:
        # The first sentence has the cause; what follows may list hundreds of accepted names.
        cause = cause.partition(". ")[0][:_LONGEST]
    return printable(cause.rstrip("."))


def _is_of_a_configuration(error: BaseException) -> bool:
    """Return whether the Hub's client refused a configuration; a process that has not loaded it has no such error."""
    errors = sys.modules.get("huggingface_hub.errors")
    return errors is not None and isinstance(error, errors.StrictDataclassError)
