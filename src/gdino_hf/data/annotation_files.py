"""Finding data sets: in folders as people have them, for each split, with their form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..error_text import reason
from ..model.printable import printable
from .createml_file import is_createml
from .forms import READERS, TITLES, KnownSet, known_set
from .image_folder import is_metadata
from .label_studio_file import is_label_studio
from .other_formats import describe_other_format
from .places import NAME_PART, SPLIT_NAMES, is_there, split_of, split_place, with_split
from .rows import is_file, parse_line

SUFFIXES = (".json", ".jsonl", ".odvg")
"""Endings of annotation files."""

# Files that lie beside annotations but hold none.
_OTHERS = ("label_map.json",)
_FIRST_BYTES, _HEAD_BYTES = 4096, 2**20
# Larger files are not parsed just to say what is wrong with them.
_MOST_PARSED_BYTES = 2**26
_NEITHER = (
    "it is neither COCO json (images, annotations, categories) nor ODVG json lines (filename with detection or "
    "grounding)"
)
_COCO_LIST = re.compile(rb'"(images|annotations|categories)"\s*:\s*\[')


def annotation_file(path: str | Path, *choices: str) -> Path:
    """Return the annotation file, or the data set of another form, that a path refers to.

    Args:
        path: An annotation file; or a folder with one, with one for each split, or with a folder for each split, as
            exports have them. COCO's folder `annotations` is looked into as well. A data set of any other form in
            `TITLES`; a split of its own is named after a colon.
        *choices: Splits to take if the folder has several, the preferred one first; "train" by default.

    Returns:
        The annotation file; for other forms the data set, with a split after a colon if it has several.

    Raises:
        ValueError: There is no data set, or there are several and none is of such a split.
    """
    base, split = split_place(path)
    path = Path(base).expanduser()
    choices = (split_of(split) or split,) if split is not None else choices or ("train",)
    if is_file(path) and _looks_like(path) is not None:
        return path
    if not _is_folder(path) or not _has_annotation_files(path):
        known = known_set(base)
        if known is not None:
            return _split_of_set(known, split, choices)
    if is_file(path):
        return path
    if not _is_folder(path):
        raise ValueError(f"{printable(path)} does not exist; give one of: {', '.join(TITLES.values())}.")
    found = _annotation_files(path)
    for name in choices:
        own = _of_split(found, name)
        inside = [path / word for word in SPLIT_NAMES.get(name, (name,))]
        own = own or [file for folder in inside for file in _annotation_places(folder)]
        if not own:
            _refuse_broken(name, path, *inside)
        if len(own) == 1:
            return own[0]
        if own:
            found = own
            break
    if not found:
        found = [file for names in SPLIT_NAMES.values() for name in names for file in _annotation_places(path / name)]
    if not found and _annotation_files(path / "annotations"):
        return annotation_file(path / "annotations", *choices)
    if len(found) > 1:
        names = printable(", ".join(str(file.relative_to(path)) for file in found))
        raise ValueError(f"{printable(path)} holds several annotation files ({names}); give the path of one of them.")
    if not found:
        raise ValueError(describe_other_format(path) or _nothing_found(path))
    return found[0]


def _nothing_found(path: Path) -> str:
    """Say that a folder holds no data set, and which files look like annotations but are none."""
    folders = [path, *(path / name for names in SPLIT_NAMES.values() for name in names), path / "annotations"]
    broken = [f"{file.relative_to(path)}: {why}" for folder in folders for file, why in _unusable(folder)]
    named = f" ({'; '.join(broken[:3])}{'; ...' if len(broken) > 3 else ''})" if broken else ""
    return f"{printable(path)} holds no annotations{printable(named)}; give one of: {', '.join(TITLES.values())}."


def _split_of_set(known: KnownSet, split: str | None, choices: Sequence[str]) -> Path:
    """Return the place of a data set's split: the one named, or the first of the choices, or the first that it has."""
    if split is None:
        split = known.split or next((name for name in (*choices, *SPLIT_NAMES) if name in known.splits), None)
    elif split not in known.splits and split not in known.splits.values():
        split = next((name for name, words in SPLIT_NAMES.items() if split in words and name in known.splits), split)
        if known.splits and split not in known.splits and not READERS[known.form].has_split(known.base, split):
            raise ValueError(
                f"{printable(known.base)} has no split {printable(split)}; it has "
                f"{printable(', '.join(known.splits.values()))}."
            )
    return Path(with_split(known.base, known.splits.get(split or "", split)))


def annotation_format(file: str | Path) -> str:
    """Return the form of a data set.

    Args:
        file: The annotation file or data set, as `annotation_file` returns it.

    Returns:
        A key of `TITLES`: "coco", "odvg", "yolo", "voc", ...

    Raises:
        ValueError: It is of none of these forms.
    """
    base, _ = split_place(file)
    found = _looks_like(Path(base)) if is_file(Path(base)) else None
    if found is None:
        known = known_set(base)
        found = None if known is None else known.form
    if found is None and not is_there(base):
        raise ValueError(f"{printable(base)} does not exist; give one of: {', '.join(TITLES.values())}.")
    if found is None:
        raise ValueError(
            describe_other_format(Path(base))
            or f"{printable(base)} holds no annotations: {_why_unusable(Path(base))}; repair it, or convert it to one "
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
    base, _ = split_place(place)
    place = Path(base).expanduser()
    if not is_there(place) or not _has_annotation_files(place if _is_folder(place) else place.parent):
        known = known_set(base)
        if known is not None:
            return _other_split(known, split)
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
    own = own or ([] if inside is None else _annotation_places(inside))
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


def _other_split(known: KnownSet, split: str) -> Path | None:
    """Return the place of a split of a data set; for a folder of one split, the folder of the other one beside it."""
    if known.splits:
        why = None if split in known.splits else READERS[known.form].absent_split(known.base, split)
        if why is not None:
            raise ValueError(why)
        return Path(with_split(known.base, known.splits[split])) if split in known.splits else None
    own = split_of(Path(known.base).name)
    if own in (None, split):
        return Path(known.base)
    beside = [Path(known.base).parent / name for name in SPLIT_NAMES[split]]
    return next((place for folder in beside for place in _annotation_places(folder)), None)


def other_splits(file: str | Path) -> list[Path]:
    """Return the annotation files of the other splits of the data set that a file belongs to."""
    base, own = split_place(file)
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
    is_split = own or split_of(Path(base).stem) or split_of(Path(base).parent.name)
    return found if is_split else []


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
        longer = [file for file in longer if NAME_PART.sub("", file.stem) == NAME_PART.sub("", like.stem)]
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


def _annotation_places(folder: Path) -> list[Path]:
    """Return the annotation files of a split's folder, or else the data set of another form that the folder is."""
    found = _annotation_files(folder)
    known = known_set(str(folder)) if not found and _is_folder(folder) else None
    return found if known is None else [_split_of_set(known, None, ())]


def all_annotation_files(folder: Path) -> Iterator[Path]:
    """Yield the annotation files of a folder, of the folders of its splits, and of its folder of annotations.

    Raises:
        ValueError: A folder cannot be read.
    """
    inside = [folder / name for names in SPLIT_NAMES.values() for name in names]
    for place in (folder, *inside, folder / "annotations"):
        yield from _annotation_files(place)


def _has_annotation_files(folder: Path) -> bool:
    return any(True for _ in all_annotation_files(folder))


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


def _looks_like(file: Path) -> str | None:
    """Detect the form from the beginning of a file, which may be larger than memory; None for anything else."""
    try:
        with file.open("rb") as stream:
            head = stream.read(_FIRST_BYTES)
            # LabelMe has a file for each picture, with the picture inside: many large files.
            if b'"shapes"' in head and (b'"version"' in head or b'"imagePath"' in head):
                return None
            head = (head + stream.read(_HEAD_BYTES)).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise ValueError(f"{printable(file)} cannot be read ({reason(error)}).") from error
    if head.startswith(b"["):
        first = _first_item(head)
        return "createml" if is_createml(first) else "labelstudio" if is_label_studio(first) else None
    try:
        content = parse_line(head.split(b"\n", 1)[0])
    except ValueError:
        # A COCO file is a single line longer than this or is spread over many lines.
        return "coco" if head.startswith(b"{") and _COCO_LIST.search(head) else None
    if "images" in content and "annotations" in content:
        return "coco"
    if "detection" in content or "grounding" in content:
        return "odvg"
    return "imagefolder" if is_metadata(content) else None


def _first_item(head: bytes) -> Any:
    """Return the first item of a JSON list whose beginning is given; None if it does not end there."""
    try:
        return json.JSONDecoder().raw_decode(head[1:].decode("utf-8", "replace").lstrip())[0]
    except (ValueError, RecursionError):
        return None
