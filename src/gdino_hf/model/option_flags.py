"""Options that are on or off, only True and False, because any text, "no" among it, would count as on; and numbers."""

from numbers import Integral
from typing import Any

import numpy as np


def checked_flag(value: Any, name: str) -> bool:
    """Return an option that is on or off.

    Args:
        value: True or False, of Python or numpy.
        name: Name of the option, for the message.

    Returns:
        The value as Python's bool.

    Raises:
        ValueError: It is something else, such as "no", 0 or None.
    """
    if not isinstance(value, (bool, np.bool_)):
        given = f"{value!r:.40}" if isinstance(value, (str, bytes)) else f"a value of type {type(value).__name__}"
        raise ValueError(f"{name} must be True or False, got {given}.")
    return bool(value)


def checked_count(value: Any, name: str, least: int = 1, unit: str = "") -> int:
    """Return an option that is a whole number.

    Args:
        value: An integer of Python or numpy.
        name: Name of the option, for the message.
        least: Smallest value allowed.
        unit: What is counted, for the message.

    Returns:
        The value as Python's int.

    Raises:
        ValueError: It is smaller, or no whole number.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r:.40}{unit and ' ' + unit}; give a whole number, at least {least}.")
    return int(value)
