"""One call for any data set on disk: what it is, is found by looking."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .coco import open_coco
from .odvg import has_captions, odvg_names, parse_line, read_odvg
from .rows import is_file, reason

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Format = Literal["coco", "odvg"]

_SUFFIXES = (".json", ".jsonl", ".odvg")
# What stands beside annotations without being any.
_OTHERS = ("label_map.json",)
_FIRST_CHOICE = "train"
_HEAD_BYTES = 2**20
_COCO_LIST = re.compile(rb'"(images|annotations|categories)"\s*:\s*\[')


def open_dataset(
    path: str | Path, images: str | Path | None = None, streaming: bool = False
) -> tuple[Dataset | IterableDataset, list[str] | None]:
    """Open a COCO json, ODVG json lines, or a folder that holds one of them.

    Args:
        path: The annotation file, or a folder with one such file; of several, the one named train is taken. ODVG label
            numbers are explained by `label_map.json` beside it.
        images: Folder of the photographs; `images` beside the annotations by default, or their own.
        streaming: Read rows as they are walked through; see `read_odvg`.

    Returns:
        The rows (see `read_coco` and `read_odvg`), and the data set's names in the order of their numbers: None where
        captions say what to look for.

    Raises:
        ValueError: There is no such file, it is of neither format, or something in it cannot be used.
    """
    file = annotation_file(path)
    if annotation_format(file) == "coco":
        return open_coco(file, images, streaming)
    rows = read_odvg(file, images, streaming=streaming)
    return rows, None if has_captions(file) else odvg_names(file) or []


def annotation_file(path: str | Path) -> Path:
    """The annotations a path means.

    Args:
        path: A file, or a folder with one annotation file.

    Returns:
        The file.

    Raises:
        ValueError: There is none, or there are several and none is named train.
    """
    path = Path(path).expanduser()
    if is_file(path):
        return path
    try:
        if not path.is_dir():
            raise ValueError(f"{path} does not exist; give a COCO json, ODVG json lines or a folder with one of them.")
        found = [file for file in sorted(path.iterdir()) if file.suffix in _SUFFIXES and file.name not in _OTHERS]
        found = [file for file in found if _looks_like(file) is not None]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({reason(error)}).") from error
    if not found:
        raise ValueError(f"{path} holds no annotations; give a COCO json or ODVG json lines, {', '.join(_SUFFIXES)}.")
    chosen = found if len(found) == 1 else [file for file in found if file.stem == _FIRST_CHOICE]
    if len(chosen) != 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{path} holds several annotation files ({names}); give the path of one.")
    return chosen[0]


def annotation_format(file: str | Path) -> Format:
    """Whether an annotation file is COCO json or ODVG json lines.

    Args:
        file: The annotations.

    Returns:
        The format.

    Raises:
        ValueError: It is neither.
    """
    found = _looks_like(Path(file))
    if found is None:
        raise ValueError(
            f"{file} is neither COCO json (images, annotations, categories) nor ODVG json lines (filename with "
            "detection or grounding); convert it to one of them."
        )
    return found


def _looks_like(file: Path) -> Format | None:
    """By the beginning of the file, which may be larger than memory."""
    try:
        with file.open("rb") as stream:
            head = stream.read(_HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({reason(error)}).") from error
    try:
        content = parse_line(head.split(b"\n", 1)[0])
    except ValueError:
        # A COCO file stands on one line longer than this or on many short ones.
        return "coco" if head.startswith(b"{") and _COCO_LIST.search(head) else None
    if "images" in content and "annotations" in content:
        return "coco"
    return "odvg" if "detection" in content or "grounding" in content else None
