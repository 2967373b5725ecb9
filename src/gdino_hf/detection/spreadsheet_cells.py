"""Cells of CSV files that a spreadsheet opens without taking a label for a formula."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Collection
from typing import Any

# Characters that make a spreadsheet take a cell for a formula, the last four in East Asian versions. Spaces before them
# change nothing in some programs.
_FORMULA_STARTS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_CONTROLS = ("\t", "\r", "\n")
_UNSEEN = ("Cc", "Cf")


def table_writer(file: Any, **options: Any) -> Any:
    """Return a csv.writer that quotes all text.

    Spreadsheets of many countries separate cells by semicolons, and would take what follows one inside a label for a
    cell of its own.

    Args:
        file: An open text file.
        **options: Further options of csv.writer.
    """
    return csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, **options)


def harmless_cell(value: Any) -> Any:
    """Return a cell's value; text that a spreadsheet would take for a formula gets an apostrophe before it.

    Args:
        value: Text, such as a label that begins with "=", or a number, which is returned as it is.
    """
    if not isinstance(value, str):
        return value
    # Marks that are not seen change as little as spaces.
    first = next((each for each in value if not each.isspace() and unicodedata.category(each) not in _UNSEEN), "")
    is_formula = value.startswith(_CONTROLS) or first in _FORMULA_STARTS
    return f"'{value}" if is_formula else value


def original_label(cell: str, names: Collection[str] | None) -> str:
    """Return the label that `harmless_cell` made a cell of.

    Args:
        cell: The cell.
        names: All labels, if they are known; one that begins with an apostrophe itself stays as it is.
    """
    is_ours = cell[:1] == "'" and harmless_cell(cell[1:]) == cell
    return cell[1:] if is_ours and cell not in (names or ()) else cell
