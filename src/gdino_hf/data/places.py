"""Names of data sets as users give them: a path, an address or an id on the Hub, with a split after a colon."""

from __future__ import annotations

import os
import re
from pathlib import Path

SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""Names that the files and folders of each split have."""

SHARDS = "::"
"""What stands between the tars of a list, as in WebDataset."""

# A split's name within a longer one, such as instances_val2017.
NAME_PART = re.compile(r"(?:^|[_.-])(train|val|valid|validation|test)(?:20\d\d)?(?=$|[_.-])", re.IGNORECASE)
_ADDRESS = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")
_SPLIT = re.compile(r"[\w][\w.+-]*(\[[\d%:]*\])?")


def split_place(place: str | Path) -> tuple[str, str | None]:
    """Split "data.yaml:val" or "USER/DATASET:test" into the data set and its split.

    Args:
        place: A path, an address or an id on the Hub, perhaps with a colon and the name of a split.

    Returns:
        The data set, and the split; None without one. What exists on disk as it is written has no split.
    """
    text = place_text(place)
    base, mark, split = text.rpartition(":")
    if not mark or not base or not _SPLIT.fullmatch(split) or is_there(text):
        return text, None
    # C:data, and the port of an address.
    if (len(base) == 1 and os.name == "nt") or (base.endswith((":", "/")) or split.isdecimal()):
        return text, None
    return base, split


def with_split(base: str, split: str | None) -> str:
    """Return the name of a split of a data set, which `split_place` takes apart again."""
    return base if split is None else f"{base}:{split}"


def is_there(place: str | Path) -> bool:
    """Return whether a path exists; False, not an exception, for names the file system does not allow."""
    try:
        return os.path.lexists(place) and os.path.exists(place)
    except (OSError, ValueError):
        return False


def split_of(name: str) -> str | None:
    """Return the split that the name of a file or folder stands for: "train", "val" or "test"; None for other names."""
    match = NAME_PART.search(name)
    word = match.group(1).lower() if match else name.lower()
    return next((split for split, names in SPLIT_NAMES.items() if word in names), None)


def place_text(place: str | Path) -> str:
    """Return a place as text, and a list of tars as one; an address that went through `Path` gets its slash again."""
    if isinstance(place, (list, tuple)):
        return SHARDS.join(map(str, place))
    return _ADDRESS.sub(r"\1://", str(place), count=1)


def is_address(place: str | Path) -> bool:
    """Return whether a place is an address such as https:// or s3://, which fsspec opens."""
    return "://" in place_text(place)
