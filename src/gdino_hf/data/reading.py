"""Opening the reader of a data set, and reading its content, whatever its form."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from ..model.text_prompt import name_key
from .annotation_files import annotation_format, other_splits
from .annotation_options import DEFAULT_OPTIONS, AnnotationOptions
from .coco_content import id_key, load_coco
from .content import Content
from .faults import Findings
from .forms import READERS, known_set
from .picture_sets import PictureSet
from .places import is_there, split_place


def open_set(
    annotations: str | Path, images: str | Path | None = None, options: AnnotationOptions = DEFAULT_OPTIONS
) -> PictureSet | None:
    """Open the reader of a data set whose annotations lie picture by picture.

    Args:
        annotations: The data set, as `annotation_file` returns it.
        images: Folder of the images, if one was named.
        options: Conventions of the data set.

    Returns:
        The reader; None for COCO and ODVG files.

    Raises:
        ValueError: It is in no form that is read here.
    """
    form = annotation_format(annotations)
    if form not in READERS:
        return None
    base, split = split_place(annotations)
    known = known_set(base)
    if known is not None:
        base, split = known.base, split or known.split
        split = known.splits.get(split or "", split)
    return READERS[form](base, split, images, options)


def read_content(
    annotations: str | Path, images: str | Path | None, options: AnnotationOptions, findings: Findings
) -> Content:
    """Read a data set of any form but ODVG.

    Args:
        annotations: The data set, as `annotation_file` returns it.
        images: Folder of the images, if one was named.
        options: Conventions of the data set.
        findings: Receives the faults of what cannot be read.

    Raises:
        ValueError: It cannot be read.
    """
    reader = None if _is_surely_coco(annotations) else open_set(annotations, images, options)
    return load_coco(annotations, findings) if reader is None else reader.content(findings)


def _is_surely_coco(annotations: str | Path) -> bool:
    """Whether a path cannot be of another form; what is wrong with it is told by reading it as COCO json."""
    if Path(annotations).suffix != ".json" or not is_there(annotations):
        return False
    try:
        return annotation_format(annotations) in ("coco", "odvg")
    except ValueError:
        return True


def names_with_boxes(annotations: str | Path) -> frozenset[str]:
    """Return the names that boxes of a data set have, in the form of `name_key`.

    Args:
        annotations: The data set; one that cannot be read, and an ODVG file, has no names.
    """
    try:
        status = os.stat(split_place(annotations)[0])
    except OSError:
        return frozenset()
    # Several readers of one data set ask for the same file, which may be large.
    return _names_with_boxes(str(annotations), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=16)
def _names_with_boxes(annotations: str, changed: int, size: int) -> frozenset[str]:
    try:
        content = read_content(annotations, None, DEFAULT_OPTIONS, Findings())
    except (OSError, ValueError):
        return frozenset()
    used = {id_key(annotation.get("category_id")) for annotation in content.annotations}
    names = {category.get("name") for category in content.categories if id_key(category.get("id")) in used}
    return frozenset(name_key(name) for name in names if isinstance(name, str))


def names_in_other_splits(annotations: str | Path) -> set[str]:
    """Return the names with boxes in the other splits of a data set, in the form of `name_key`."""
    return set().union(*(names_with_boxes(path) for path in other_splits(annotations)))
