"""Where the weight files of a model lie: in its folder or in the Hub's cache, and nowhere else."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from .printable import printable

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def shard_names(index: Path) -> list[str]:
    """Read the names of the weight files from the index of a sharded checkpoint.

    Args:
        index: Path of the index, a JSON file.

    Returns:
        The names in the order of the index, each once.

    Raises:
        ValueError: The index is damaged, names a file outside its folder, or a file is missing.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{index} is not a JSON file that can be read; fetch it again.") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map that names a file for every tensor; fetch it again.")
    folder = index.parent
    names = list(dict.fromkeys(str(name) for name in weight_map.values()))
    for name, original in zip(names, dict.fromkeys(map(repr, weight_map.values())), strict=False):
        if original != repr(name):
            raise ValueError(f"{index} gives {original} as the file of a tensor, not a name; fetch it again.")
    for name in names:
        if not _inside(folder, name):
            raise ValueError(
                f"{index} names {name!r}, which lies outside its folder; put every weight file into the folder itself."
            )
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name}, which is not in the folder; fetch all of its files.")
    return names


def _inside(folder: Path, name: str) -> bool:
    """Whether a file name stays in a folder; files of the Hub's cache may link to the cache's stores of contents."""
    if not name or "\0" in name or "\\" in name or Path(name).is_absolute():
        return False
    roots = [folder.resolve(), *_stores(Path(os.path.abspath(folder))), *_stores(folder.resolve())]
    path = folder / name
    # The name itself must not lead out either, even if a link leads back in.
    return ".." not in Path(name).parts and any(path.resolve().is_relative_to(root) for root in roots)


def _stores(folder: Path) -> list[Path]:
    """Return where the contents of files of the Hub's cache lie, if a folder is a snapshot in it or inside of one."""
    snapshot = next((path for path in (folder, *folder.parents) if path.parent.name == "snapshots"), None)
    if snapshot is None:
        return []
    repository = snapshot.parent.parent
    # Several repositories share the second one.
    shared = [repository.parent / "blobs"] if re.match(r"[a-z]+--.", repository.name) else []
    return [store.resolve() for store in (repository / "blobs", *shared)]


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Refuse weight files that are links to files outside their folder, as an index that names such files is refused.

    Whoever made the folder could otherwise have a file of the user's own read, converted and uploaded. Links to the
    stores of the Hub's cache are followed, and so is a link to the folder itself.

    Args:
        folder: A model's folder.
        names: Names of files in it.

    Raises:
        ValueError: A file is such a link.
    """
    for name in sorted(names):
        if not _inside(folder, name):
            raise ValueError(
                f"{printable(folder / name)} is a link to a file outside its folder; put the file itself there, or "
                "link the whole folder."
            )


def check_shard_indices(folder: Path) -> None:
    """Check the index of every sharded checkpoint in a folder; see `shard_names`."""
    for index in sorted({*(folder / name for name in INDEX_FILES), *folder.glob("*.index.*.json")}):
        if index.is_file():
            shard_names(index)
