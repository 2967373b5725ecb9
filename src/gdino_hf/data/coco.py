"""Data sets of boxes as a `datasets.Dataset` whose images are decoded when a row is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .annotation_options import DEFAULT_OPTIONS, AnnotationOptions
from .coco_file import CocoFile, CocoImage
from .faults import MISSING, OUTSIDE, UNREADABLE, StrictFindings
from .reading import open_set
from .rows import clip_box, make_dataset, make_stream
from .stored_pictures import image_value

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def read_coco(
    annotations: str | Path,
    images: str | Path | None = None,
    streaming: bool = False,
    options: AnnotationOptions = DEFAULT_OPTIONS,
) -> Dataset | IterableDataset:
    """Read a COCO detection file; images are decoded only when a row is read.

    Boxes are those of the upright picture, as it is seen: where the annotated width and height are those of the picture
    as stored, boxes are turned with it. A box that is missing is taken from its segment.

    Args:
        annotations: The COCO json file; its boxes are absolute xywh.
        images: Folder of the images; by default `images` beside the json file, or else the json file's own folder.
        streaming: Create rows one by one while iterating. The json file is still read as a whole, since its format
            does not allow otherwise; for annotations larger than memory use ODVG.
        options: Conventions of the file.

    Returns:
        One row per image, in file order: `image` (PIL), `image_id` (an integer, or text if the file has text ids),
        `width`, `height`, `boxes` ((N, 4) xyxy in pixels, clipped to the image), `names` (N) and `crowd` (N). Boxes
        without area are dropped. If some images say which names are absent from them ("neg_names", or LVIS'
        "neg_category_ids"), also `neg_names`: these names, or None for an image that does not say. What was turned,
        scaled or left out is logged, one line for each kind.

    Raises:
        ValueError: The file is not a COCO detection file, holds something that cannot be used, or lists an image file
            that does not exist. `check_dataset` lists everything to repair.
    """
    return open_coco(annotations, images, streaming, options)[0]


def open_coco(
    annotations: str | Path,
    images: str | Path | None = None,
    streaming: bool = False,
    options: AnnotationOptions = DEFAULT_OPTIONS,
    log: bool = True,
) -> tuple[Dataset | IterableDataset, list[str]]:
    """Return the rows and the names of a COCO file or a data set of another form but ODVG, reading it only once.

    Args:
        annotations: The COCO json file or the data set, as `annotation_file` returns it.
        images: Folder of the images, as in `read_coco`.
        streaming: Whether to create rows while iterating, as in `read_coco`.
        options: Conventions of the file.
        log: Whether to log what was turned, scaled or left out.

    Returns:
        The results of `read_coco` and of `category_names`.

    Raises:
        ValueError: The file cannot be used, as in `read_coco`.
    """
    findings = reader_findings(annotations, options)
    reader = open_set(annotations, images, options)
    if reader is not None and streaming:
        arguments = {"annotations": str(annotations), "images": _text(images), "options": options}
        return make_stream(_read_parts, False, {**arguments, "parts": reader.parts()}), reader.labels()
    file = CocoFile(annotations, images, options, findings, None if reader is None else reader.content(findings))
    if streaming:
        arguments = {"annotations": str(annotations), "images": _text(images), "options": options}
        return make_stream(_read_rows, False, arguments, file.has_text_ids, file.has_absent_names), file.labels
    holds_pictures = reader is not None and reader.holds_pictures
    rows = make_dataset(_rows(file, with_images=not holds_pictures), False, file.has_text_ids, file.has_absent_names)
    if reader is not None:
        rows = reader.joined(rows)
    if log:
        findings.log()
    return rows, file.labels


def category_names(annotations: str | Path, options: AnnotationOptions = DEFAULT_OPTIONS) -> list[str]:
    """Return the distinct category names of a COCO file, in the order of their ids.

    Args:
        annotations: The COCO json file.
        options: Conventions of the file.

    Returns:
        The names, without those that only group others (see `AnnotationOptions.groups`).

    Raises:
        ValueError: The file is not a COCO detection file, or a category has no name.
    """
    return CocoFile(annotations, None, options, reader_findings(annotations, options)).labels


def reader_findings(annotations: str | Path, options: AnnotationOptions) -> StrictFindings:
    """Return findings that raise an exception at the first fault which the options do not tolerate.

    Args:
        annotations: The file, for messages.
        options: Conventions of the file.
    """
    skipped = (MISSING, UNREADABLE, OUTSIDE) if options.unreadable == "skip" else ()
    # Annotations of images that a file does not list are common in subsets, and harmless.
    return StrictFindings(annotations, skip=("unknown images", *skipped))


def _read_rows(annotations: str, images: str | None, options: AnnotationOptions) -> Iterator[dict[str, Any]]:
    findings = reader_findings(annotations, options)
    # Without the option to skip it, a damaged image is yielded: whoever reads the stream names it or skips it.
    yield from _rows(CocoFile(annotations, images, options, findings), check_damage=options.unreadable == "skip")
    findings.log()


def _read_parts(
    annotations: str, images: str | None, options: AnnotationOptions, parts: list[tuple[int, int]]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set whose annotations lie picture by picture, reading some pictures at a time."""
    findings = reader_findings(annotations, options)
    reader = open_set(annotations, images, options)
    assert reader is not None
    for begin, end in parts:
        file = CocoFile(annotations, images, options, findings, reader.content(findings, begin, end))
        yield from _rows(file, check_damage=options.unreadable == "skip")
    findings.log()


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _rows(file: CocoFile, check_damage: bool = True, with_images: bool = True) -> Iterator[dict[str, Any]]:
    for image in file.images(check_damage=check_damage):
        yield {"image": image_value(image.path) if with_images else None, **annotated_row(image, file)}


def annotated_row(image: CocoImage, file: CocoFile) -> dict[str, Any]:
    """Return an image's row as `read_coco` has it, without the image itself.

    Args:
        image: The image.
        file: The file that it is from.
    """
    width, height = image.size or (0, 0)
    number = str(image.id) if file.has_text_ids else image.id
    row: dict[str, Any] = {"image_id": number, "width": width, "height": height, "boxes": [], "names": [], "crowd": []}
    if file.has_absent_names:
        row["neg_names"] = image.absent
    for box, category, crowd in zip(image.boxes, image.categories, image.crowd, strict=True):
        inside = clip_box(box, width, height)
        if inside is not None:
            row["boxes"].append(inside)
            row["names"].append(file.names[category])
            row["crowd"].append(crowd)
    return row
