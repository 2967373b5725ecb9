"""Finding annotation files: in folders as people have them, for each split, with their format."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from ..error_text import reason
from ..model.printable import printable
from .other_formats import describe_other_format
from .rows import is_file, parse_line

Format = Literal["coco", "odvg"]

SUFFIXES = (".json", ".jsonl", ".odvg")
"""Endings of annotation files."""

SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""Names that the files and folders of each split have."""

# Files that lie beside annotations but hold none.
_OTHERS = ("label_map.json",)
_HEAD_BYTES = 2**20
# Larger files are not parsed just to say what is wrong with them.
_MOST_PARSED_BYTES = 2**26
_NEITHER = (
    "it is neither COCO json (images, annotations, categories) nor ODVG json lines (filename with detection or "
    "grounding)"
)
_COCO_LIST = re.compile(rb'"(images|annotations|categories)"\s*:\s*\[')
# A split's name within a longer one, such as instances_val2017.
_NAME_PART = re.compile(r"(?:^|[_.-])(train|val|valid|validation|test)(?:20\d\d)?(?=$|[_.-])", re.IGNORECASE)


def annotation_file(path: str | Path, *choices: str) -> Path:
    """Return the annotation file that a path refers to.

    Args:
        path: An annotation file; or a folder with one, with one for each split, or with a folder for each split, as
            exports have them. COCO's folder `annotations` is looked into as well.
        *choices: Splits to take if the folder has several, the preferred one first; "train" by default.

    Returns:
        The annotation file.

    Raises:
        ValueError: There is no annotation file, or there are several and none is of such a split.
    """
    path = Path(path).expanduser()
    if is_file(path):
        return path
    if not _is_folder(path):
        raise ValueError(
            f"{printable(path)} does not exist; give a COCO json file, an ODVG json lines file or a folder with one of "
            "them."
        )
    found = _annotation_files(path)
    for split in choices or ("train",):
        own = _of_split(found, split)
        inside = [path / name for name in SPLIT_NAMES.get(split, ())]
        own = own or [file for folder in inside for file in _annotation_files(folder)]
        if not own:
            _refuse_broken(split, path, *inside)
        if len(own) == 1:
            return own[0]
        if own:
            found = own
            break
    if not found:
        found = [file for names in SPLIT_NAMES.values() for name in names for file in _annotation_files(path / name)]
    if not found and _annotation_files(path / "annotations"):
        return annotation_file(path / "annotations", *choices)
    if len(found) > 1:
        names = printable(", ".join(str(file.relative_to(path)) for file in found))
        raise ValueError(f"{printable(path)} holds several annotation files ({names}); give the path of one of them.")
    if not found:
        endings = ", ".join(SUFFIXES)
        known = describe_other_format(path)
        if known is not None:
            raise ValueError(known)
        folders = [path, *(path / name for names in SPLIT_NAMES.values() for name in names), path / "annotations"]
        broken = [f"{file.relative_to(path)}: {why}" for folder in folders for file, why in _unusable(folder)]
        named = f" ({'; '.join(broken[:3])}{'; ...' if len(broken) > 3 else ''})" if broken else ""
        raise ValueError(
            f"{printable(path)} holds no annotations{printable(named)}; give a COCO json or ODVG json lines file "
            f"({endings})."
        )
    return found[0]


def annotation_format(file: str | Path) -> Format:
    """Detect whether an annotation file is COCO json or ODVG json lines.

    Args:
        file: The annotation file.

    Returns:
        "coco" or "odvg".

    Raises:
        ValueError: The file has neither format.
    """
    found = _looks_like(Path(file))
    if found is None:
        raise ValueError(
            describe_other_format(Path(file))
            or f"{printable(file)} holds no annotations: {_why_unusable(Path(file))}; repair it, or convert it to one "
            "of these."
        )
    return found


def find_split(place: str | Path, split: str) -> Path | None:
    """Find a split's annotation file: `train.json`, or the annotation file inside `train/`.

    Args:
        place: A folder of splits, a folder of this split, or the annotation file of another split.
        split: "train", "val" or "test".

    Returns:
        The file; None if there is none.

    Raises:
        ValueError: There are several, or the folder cannot be read.
    """
    place = Path(place)
    folder = place if _is_folder(place) else place.parent
    found = [file for file in _annotation_files(folder) if file != place]
    own = _of_split(found, split, None if folder == place else place)
    beside = folder
    if not own and folder != place:
        # If the given file lies in a split's own folder, the other splits' folders are beside that one.
        if split_of(folder.name) is not None:
            beside = folder.parent
        elif split_of(place.stem) is None:
            return None
    inside = next((beside / name for name in SPLIT_NAMES[split] if _is_folder(beside / name)), None)
    own = own or ([] if inside is None else _annotation_files(inside))
    if not own and folder == place:
        if split_of(folder.name) in (None, split):
            # A folder of one split, such as an export's train/, stands for that split; so does a folder of one file.
            own = [file for file in found if split_of(file.stem) in (None, split)]
        if not own and _annotation_files(folder / "annotations"):
            return find_split(folder / "annotations", split)
    if not own:
        _refuse_broken(split, *([folder] if folder != place or split_of(folder.name) in (None, split) else []), inside)
    if len(own) > 1:
        names = printable(", ".join(file.name for file in own))
        raise ValueError(
            f"{printable(own[0].parent)} holds several annotation files for {split} ({names}); name one of them."
        )
    return own[0] if own else None


def other_splits(file: str | Path) -> list[Path]:
    """Return the annotation files of the other splits of the data set that a file belongs to."""
    file = Path(file)
    found = []
    for split in SPLIT_NAMES:
        try:
            beside = find_split(file, split)
        except ValueError:
            # Whether that split can be used is no matter of this one.
            continue
        if beside is not None and beside != file:
            found.append(beside)
    return found if split_of(file.stem) or split_of(file.parent.name) else []


def split_of(name: str) -> str | None:
    """Return the split that the name of a file or folder stands for: "train", "val" or "test"; None for other names."""
    match = _NAME_PART.search(name)
    word = match.group(1).lower() if match else name.lower()
    return next((split for split, names in SPLIT_NAMES.items() if word in names), None)


def _of_split(files: list[Path], split: str, like: Path | None = None) -> list[Path]:
    """Return the files named exactly like a split, or else those that have its name within theirs.

    Args:
        files: Annotation files.
        split: Name of the split.
        like: File of another split, which the longer names must then equal but for the split.
    """
    exact = [file for file in files if file.stem in SPLIT_NAMES.get(split, (split,))]
    longer = [file for file in files if split_of(file.stem) == split]
    if like is not None:
        longer = [file for file in longer if _NAME_PART.sub("", file.stem) == _NAME_PART.sub("", like.stem)]
    return exact or longer


def _annotation_files(folder: Path) -> list[Path]:
    """Return the files of a folder that hold annotations; none if there is no such folder."""
    if not _is_folder(folder):
        return []
    try:
        files = [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES and file.name not in _OTHERS]
        return [file for file in files if is_file(file) and _looks_like(file) is not None]
    except OSError as error:
        raise ValueError(f"{printable(folder)} cannot be read ({reason(error)}).") from error


def _refuse_broken(split: str, *folders: Path | None) -> None:
    """Raise an error if a file called like a split, or lying in its folder, is damaged or holds something else.

    Other files of a folder, such as configurations and results, are no annotations and need not be named.
    """
    for folder in folders:
        for file, why in _unusable(folder):
            is_exact = file.stem in SPLIT_NAMES.get(split, (split,))
            is_meant = split_of(file.stem) == split or (folder is not None and split_of(folder.name) == split)
            if is_exact or (is_meant and not why.startswith(_NEITHER)):
                raise ValueError(f"{printable(file)} holds no annotations: {why}; repair it, or remove it.")


def _unusable(folder: Path | None) -> list[tuple[Path, str]]:
    """Return the files of a folder that are called like annotation files but hold none, each with the reason."""
    if folder is None or not _is_folder(folder):
        return []
    try:
        files = [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES and file.name not in _OTHERS]
        return [(file, _why_unusable(file)) for file in files if is_file(file) and _looks_like(file) is None]
    except OSError:
        # Reading the folder was reported before.
        return []


def _why_unusable(file: Path) -> str:
    """Say why a file holds no annotations that are read here."""
    try:
        size = file.stat().st_size
        if size == 0:
            return "it is empty"
        if size <= _MOST_PARSED_BYTES:
            content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
            json.loads(content.split(b"\n", 1)[0] if file.suffix != ".json" else content)
    except RecursionError:
        return "it is nested too deeply"
    except (OSError, ValueError) as error:
        return f"it is not valid json ({reason(error)})"
    return _NEITHER


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _looks_like(file: Path) -> Format | None:
    """Detect the format from the beginning of the file, which may be larger than memory; None for anything else."""
    try:
        with file.open("rb") as stream:
            head = stream.read(_HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise ValueError(f"{printable(file)} cannot be read ({reason(error)}).") from error
    try:
        content = parse_line(head.split(b"\n", 1)[0])
    except ValueError:
        # A COCO file is a single line longer than this or is spread over many lines.
        return "coco" if head.startswith(b"{") and _COCO_LIST.search(head) else None
    if "images" in content and "annotations" in content:
        return "coco"
    return "odvg" if "detection" in content or "grounding" in content else None
