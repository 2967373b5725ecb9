"""Opening any data set on disk with one call, which detects the format from the file's content."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..error_text import reason
from .annotation_options import DEFAULT_OPTIONS, AnnotationOptions
from .coco import open_coco
from .odvg import has_captions, odvg_names, parse_line, read_odvg
from .rows import is_file

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Format = Literal["coco", "odvg"]

_SUFFIXES = (".json", ".jsonl", ".odvg")
# Files that lie beside annotations but hold none.
_OTHERS = ("label_map.json",)
_HEAD_BYTES = 2**20
_COCO_LIST = re.compile(rb'"(images|annotations|categories)"\s*:\s*\[')


SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""Names that the files and folders of each split have."""


def open_dataset(
    path: str | Path,
    images: str | Path | None = None,
    streaming: bool = False,
    options: AnnotationOptions = DEFAULT_OPTIONS,
    log: bool = True,
) -> tuple[Dataset | IterableDataset, list[str] | None]:
    """Open a COCO json file, an ODVG json lines file, or a folder that holds one of them.

    Args:
        path: The annotation file, or a folder with one such file, or with a folder for each split; of several, the one
            named train is used. Names of ODVG label numbers are read from a `label_map.json` beside the file.
        images: Folder of the images; by default they are looked for one by one in `images` beside the annotations, in
            their own folder, and in one beside them of the file's name.
        streaming: Read rows while iterating instead of all at once; see `read_odvg`.
        options: Conventions of the file.
        log: Whether to log what was turned, scaled or left out in a COCO file.

    Returns:
        The rows (see `read_coco` and `read_odvg`), and the data set's names in the order of their numbers, or None if
        captions take the place of names.

    Raises:
        ValueError: There is no such file, it has neither format, or something in it cannot be used.
    """
    file = annotation_file(path)
    if annotation_format(file) == "coco":
        return open_coco(file, images, streaming, options, log)
    rows = read_odvg(file, images, streaming=streaming, options=options)
    return rows, None if has_captions(file) else odvg_names(file) or []


def annotation_file(path: str | Path, first_choice: str = "train") -> Path:
    """Return the annotation file that a path refers to.

    Args:
        path: An annotation file, or a folder with one, or with a folder for each split.
        first_choice: Name (without its ending) of the file to use if the folder holds several.

    Returns:
        The annotation file.

    Raises:
        ValueError: There is no annotation file, or there are several and none has that name.
    """
    path = Path(path).expanduser()
    if is_file(path):
        return path
    try:
        if not path.is_dir():
            raise ValueError(
                f"{path} does not exist; give a COCO json file, an ODVG json lines file or a folder with one of them."
            )
        found = [file for file in sorted(path.iterdir()) if file.suffix in _SUFFIXES and file.name not in _OTHERS]
        found = [file for file in found if _looks_like(file) is not None]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({reason(error)}).") from error
    if not found:
        for name in SPLIT_NAMES.get(first_choice, ()):
            if (path / name).is_dir():
                return annotation_file(path / name, first_choice)
        if _looks_like_yolo(path):
            raise ValueError(
                f"{path} holds a YOLO data set, which is not read here; export it as COCO, or convert it with "
                "supervision's DetectionDataset.from_yolo(...).as_coco(...)."
            )
        endings = ", ".join(_SUFFIXES)
        raise ValueError(f"{path} holds no annotations; give a COCO json or ODVG json lines file ({endings}).")
    chosen = found if len(found) == 1 else [file for file in found if file.stem == first_choice]
    if len(chosen) != 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{path} holds several annotation files ({names}); give the path of one of them.")
    return chosen[0]


def _looks_like_yolo(folder: Path) -> bool:
    """Whether a folder has the files of a YOLO export: data.yaml, or label texts beside images."""
    if any((place / name).is_file() for place in (folder, folder.parent) for name in ("data.yaml", "data.yml")):
        return True
    return (folder / "labels").is_dir() and next((folder / "labels").rglob("*.txt"), None) is not None


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
            f"{file} is neither COCO json (images, annotations, categories) nor ODVG json lines (filename with "
            "detection or grounding); convert it to one of them."
        )
    return found


def _looks_like(file: Path) -> Format | None:
    """Detect the format from the beginning of the file, which may be larger than memory; None for anything else."""
    try:
        with file.open("rb") as stream:
            head = stream.read(_HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({reason(error)}).") from error
    try:
        content = parse_line(head.split(b"\n", 1)[0])
    except ValueError:
        # A COCO file is a single line longer than this or is spread over many lines.
        return "coco" if head.startswith(b"{") and _COCO_LIST.search(head) else None
    if "images" in content and "annotations" in content:
        return "coco"
    return "odvg" if "detection" in content or "grounding" in content else None
