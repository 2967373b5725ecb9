"""Opening a data set of any form with one call, which recognizes the form from the content."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..model.option_flags import checked_flag
from .annotation_files import annotation_file, annotation_format
from .annotation_options import DEFAULT_OPTIONS, AnnotationOptions
from .coco import open_coco
from .odvg import read_odvg
from .odvg_content import has_captions, odvg_names

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def open_dataset(
    path: str | Path,
    images: str | Path | None = None,
    streaming: bool = False,
    options: AnnotationOptions = DEFAULT_OPTIONS,
    log: bool = True,
) -> tuple[Dataset | IterableDataset, list[str] | None]:
    """Open a data set of any form in `TITLES`, or a folder that holds one.

    Args:
        path: The annotation file; or a folder with one such file, with a folder for each split, or of another form; of
            several splits, train is used, and "data.yaml:val" names one. Names of ODVG label numbers are read from a
            `label_map.json` beside the file.
        images: Folder of the images; by default they are looked for one by one in `images` beside the annotations, in
            their own folder, and in one beside them of the file's name.
        streaming: Read rows while iterating instead of all at once; see `read_odvg`.
        options: Conventions of the file.
        log: Whether to log what was turned, scaled or left out; ODVG files always do.

    Returns:
        The rows (see `read_coco` and `read_odvg`), and the data set's names in the order of their numbers, or None if
        captions take the place of names.

    Raises:
        ValueError: There is no such data set, its form is unknown, something in it cannot be used, or `streaming` is
            neither True nor False.
    """
    streaming = checked_flag(streaming, "streaming")
    file = annotation_file(path)
    if annotation_format(file) != "odvg":
        return open_coco(file, images, streaming, options, log)
    rows = read_odvg(file, images, streaming=streaming, options=options)
    return rows, None if has_captions(file) else odvg_names(file) or []
