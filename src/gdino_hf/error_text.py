"""Why a library refused something, in words that fit into a sentence."""

from __future__ import annotations

from huggingface_hub.errors import StrictDataclassError

CONFIG_ERRORS = (TypeError, ValueError, StrictDataclassError)
"""What making a configuration from unfit fields raises."""


def reason(error: BaseException) -> str:
    """The gist of an error: its last line for a configuration's, else its first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[-1] if isinstance(error, StrictDataclassError) else lines[0]
    return line.strip().removeprefix("ValueError: ").rstrip(".")
