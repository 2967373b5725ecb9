"""Cells of CSV files that a spreadsheet opens without taking a label for a formula."""

from __future__ import annotations

from typing import Any

# Characters that make a spreadsheet take a cell for a formula, the last four in East Asian versions. Spaces before them
# change nothing in some programs.
_FORMULA_STARTS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_CONTROLS = ("\t", "\r", "\n")


def harmless_cell(value: Any) -> Any:
    """Return a cell's value; text that a spreadsheet would take for a formula gets an apostrophe before it.

    Args:
        value: Text, such as a label that begins with "=", or a number, which is returned as it is.
    """
    if not isinstance(value, str):
        return value
    is_formula = value.startswith(_CONTROLS) or value.lstrip().startswith(_FORMULA_STARTS)
    return f"'{value}" if is_formula else value
