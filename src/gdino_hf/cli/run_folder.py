"""Where a verb's results go: a folder of their own, never one that is there already."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from .errors import UsageError


def new_run_folder(verb: str, name: str, root: str | Path = "runs") -> Path:
    """Make root/verb/name, or name-2, name-3 and so on where the earlier ones exist.

    Args:
        verb: "train", "eval", ...
        name: What the user calls the run.
        root: Folder of all runs.

    Returns:
        The new, empty folder.

    Raises:
        UsageError: The name is no plain file name, or the folder cannot be made.
    """
    if not name.strip(". ") or Path(name).name != name:
        raise UsageError(f"--name {name!r} is no name of a folder; leave out slashes and give at least one letter")
    for number in count(1):
        folder = Path(root) / verb / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if folder.parent.is_dir():
                continue
            raise UsageError(f"{folder} cannot be made (a file stands in its way); name another --runs") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"{folder} cannot be made ({error}); name another --runs") from error
        return folder
    raise AssertionError("count() does not end")
