"""A new folder for each run's results, so that no run overwrites another."""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path

from gdino_hf.data.places import split_place
from gdino_hf.error_text import reason

from .errors import UsageError


def place_name(place: str) -> str:
    """Return the name of a data set for a run's folder: that of its file without the ending, or of its folder or id."""
    path = Path(split_place(place)[0]).absolute()
    name = path.stem if path.is_file() else path.name
    return re.sub(r"[^\w. -]", "_", name)


def new_run_folder(verb: str, name: str, root: str | Path = "runs") -> Path:
    """Make the folder root/verb/name, or root/verb/name-2, name-3 and so on if earlier ones exist.

    Args:
        verb: Name of the subcommand, for instance "train".
        name: Name the user gave the run.
        root: Folder that holds all runs.

    Returns:
        The new, empty folder.

    Raises:
        UsageError: The name is not a plain file name, or the folder cannot be made.
    """
    if not name.strip(". ") or Path(name).name != name:
        raise UsageError(f"--name {name!r} is not a folder name; leave out slashes and give at least one letter")
    for number in count(1):
        folder = Path(root) / verb / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if folder.parent.is_dir():
                continue
            raise UsageError(f"{folder} cannot be made (a file is in its place); choose another --runs") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"{folder} cannot be made ({reason(error)}); choose another --runs") from error
        return folder
    raise AssertionError("count() does not end")
