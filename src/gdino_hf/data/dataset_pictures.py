"""Going through the pictures of a data set of any form, one by one, without decoding them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .annotation_files import annotation_file, annotation_format
from .annotation_options import DEFAULT_OPTIONS, AnnotationOptions
from .coco import annotated_row
from .coco_file import CocoFile
from .content import Content
from .faults import ERRORS, StrictFindings
from .odvg import odvg_rows
from .picture_sets import PictureSet
from .reading import open_set
from .stored_pictures import Picture, read_row_picture, row_picture


@dataclass(frozen=True)
class DatasetPicture:
    """A picture of a data set with its annotations.

    Attributes:
        name: Its path inside the data set, as the annotations have it.
        picture: Its path, which need not exist, or a `StoredPicture`.
        row: `image_id`, `width`, `height` (0 if unknown), `boxes` ((N, 4) xyxy in pixels of the upright picture),
            `names` (N) and `crowd` (N); for captions also `caption` and `spans`.
    """

    name: str
    picture: Picture
    row: dict[str, Any]

    def open(self) -> Image.Image:
        """Decode the picture, upright and in RGB.

        Raises:
            ValueError: It is missing, damaged or beyond a limit.
        """
        return read_row_picture(row_picture(self.picture))


def dataset_pictures(
    path: str | Path, images: str | Path | None = None, options: AnnotationOptions = DEFAULT_OPTIONS
) -> Iterator[DatasetPicture]:
    """Yield the pictures of a data set in its order.

    Args:
        path: The data set as for `open_dataset`, with a split after a colon if another one than train is meant.
        images: Folder of the images; found as `open_dataset` finds it by default.
        options: Conventions of the data set.

    Yields:
        A picture and its row. Files are not checked; a missing or damaged one is an error of `open`. Faults of
        annotations are logged and stop nothing. COCO files are read as a whole, other forms some pictures at a time.

    Raises:
        ValueError: There is no such data set, or it cannot be read.
    """
    file = annotation_file(path)
    if annotation_format(file) == "odvg":
        for row in odvg_rows(file, images, options):
            picture = Path(row.pop("image"))
            yield DatasetPicture(picture.name, picture, row)
        return
    findings = StrictFindings(file, skip=tuple(ERRORS))
    reader = open_set(file, images, options)
    contents: Iterator[Content | None] = iter([None]) if reader is None else _contents(reader, findings)
    for content in contents:
        annotated = CocoFile(file, images, options, findings, content)
        for image in annotated.images(need_files=False, keep_faulty=True):
            name = str(image.entry.get("file_name", image.path.name))
            yield DatasetPicture(name, image.path, annotated_row(image, annotated))

    findings.log()


def _contents(reader: PictureSet, findings: Any) -> Iterator[Content | None]:
    for begin, end in reader.parts():
        yield reader.content(findings, begin, end)
