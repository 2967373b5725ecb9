"""ODVG json lines (Open-GroundingDino, MM-Grounding-DINO): detection or grounding annotations, one image per line."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..error_text import reason
from ..model.printable import printable
from ..model.text_prompt import shorten
from .annotation_options import DEFAULT_OPTIONS, AnnotationOptions
from .coco import reader_findings
from .faults import FEW, MISSING, OUTSIDE, UNREADABLE, FaultError, StrictFindings, describe
from .frames import Frame, annotated_size, find_frame, read_header
from .image_paths import ImagePaths, OutsideError
from .odvg_content import (
    MIXED,
    UnknownLabelError,
    entry_boxes,
    entry_name,
    has_captions,
    line_absent_names,
    line_entries,
    locate_phrase,
    odvg_lines,
    odvg_names,
    read_label_map,
    says_absent_names,
)
from .rows import (
    BoxRange,
    clip_box,
    is_file,
    make_dataset,
    make_stream,
    parse_line,
    parse_text,
    report_box,
)

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["has_captions", "locate_phrase", "odvg_names", "odvg_rows", "read_label_map", "read_odvg"]

logger = logging.getLogger(__name__)

# Number of parts a file is split into, to be shared among the workers of a data loader.
_NUM_PARTS = 64


def read_odvg(
    annotations: str | Path,
    images: str | Path | None = None,
    label_map: str | Path | Mapping[Any, str] | None = None,
    streaming: bool = False,
    options: AnnotationOptions = DEFAULT_OPTIONS,
) -> Dataset | IterableDataset:
    """Read an ODVG json lines file; images are decoded only when a row is read.

    A line is {"filename", "width", "height"} with either "detection": {"instances": [{"bbox" xyxy, "label",
    "category"}]} or "grounding": {"caption", "regions": [{"bbox", "phrase", "tokens_positive"}]}. A region's bbox may
    be a list of boxes, and its phrase a list of pieces. tokens_positive are [start, end) characters of the caption; a
    phrase without them must occur in the caption exactly once, as whole words.

    Args:
        annotations: The json lines file.
        images: Folder of the images; by default `images` beside the file, or else the file's own folder.
        label_map: Name of each label number, {"0": "cat", ...}, or the path of a json file with them, for instances
            without a category; by default `label_map.json` beside the file.
        streaming: Read the file line by line while iterating. A line whose image is missing is then logged and skipped
            instead of stopping a training run.
        options: Conventions of the file, as in `read_coco`.

    Returns:
        One row per line that can be used, as in `read_coco`; `image_id` is the line's number from 0. Lines that cannot
        be used are left out and counted in the log. If the first line is a grounding line, rows also have `caption` and
        `spans`, and `names` holds the phrases. If a line has "neg_names", rows also have `neg_names`.

    Raises:
        ValueError: An image does not exist or is damaged, lines with and without captions are mixed, or no line can be
            used; `check_dataset` lists all such lines.
    """
    names = read_label_map(annotations, label_map)
    captions = has_captions(annotations)
    # A damaged image of a stream is yielded unless it may be skipped; decoding it names it.
    check_damage = not streaming or options.unreadable == "skip"
    arguments: dict[str, Any] = {
        "annotations": str(annotations),
        "places": _Places(ImagePaths(annotations, images, options), options, check_damage=check_damage),
        "names": names,
        "captions": captions,
    }
    absent = says_absent_names(annotations)
    if streaming:
        parts = _parts(Path(annotations))
        return make_stream(_stream, captions, {**arguments, "parts": parts}, absent=absent)
    return make_dataset(_all_rows(**arguments), captions, absent=absent)


def odvg_rows(
    annotations: str | Path, images: str | Path | None = None, options: AnnotationOptions = DEFAULT_OPTIONS
) -> Iterator[dict[str, Any]]:
    """Yield the rows of `read_odvg` with the path of each image instead of the image, which need not exist.

    Args:
        annotations: The json lines file.
        images: Folder of the images, as in `read_odvg`.
        options: Conventions of the file, as in `read_coco`.

    Yields:
        One row per line.

    Raises:
        ValueError: No line can be used, or lines with and without captions are mixed.
    """
    places = _Places(ImagePaths(annotations, images, options), options, need_files=False)
    names = read_label_map(annotations, None)
    yield from _all_rows(str(annotations), places, names, has_captions(annotations))


@dataclass(frozen=True)
class _Places:
    """Where the images of a file are looked for, the conventions of their sizes, and which faults of files count."""

    paths: ImagePaths
    options: AnnotationOptions
    need_files: bool = True
    check_damage: bool = True
    seen: BoxRange = field(default_factory=BoxRange)


class _MixedLinesError(ValueError):
    """A line has a caption, but the first line has none."""


def _row(
    line: bytes,
    number: int,
    places: _Places,
    names: Mapping[int, str],
    captions: bool,
    findings: StrictFindings,
) -> dict[str, Any] | None:
    """Return the row of a line, or None if its image may be skipped and is missing, damaged or outside."""
    content = parse_line(line)
    filename = parse_text(content.get("filename"), "its filename")
    where = f"line {number + 1}"
    entries, caption = line_entries(content)
    if caption is not None and not captions:
        raise _MixedLinesError(MIXED)
    named = [(entry, *entry_name(entry, names, caption)) for entry in entries]
    try:
        path = places.paths.find(filename)
    except OutsideError as error:
        findings.add(OUTSIDE, f"{where}: {error}")
        return None
    frame = _frame(path, annotated_size(content, where, findings.add), places, findings)
    if frame is None:
        return None
    width, height = frame.width, frame.height
    row: dict[str, Any] = {"image": str(path), "image_id": number, "width": width, "height": height}
    row |= {"boxes": [], "names": [], "crowd": [], "spans": [], "caption": caption}
    for entry, name, pairs in named:
        try:
            boxes = entry_boxes(entry)
        except ValueError as error:
            findings.add("broken boxes", f"{where}: {error}")
            continue
        for box in boxes:
            places.seen.add(box)
            report_box(frame.box(box), width, height, where, findings.add)
            inside = clip_box(frame.box(box), width, height)
            if inside is not None:
                row["boxes"].append(inside)
                row["names"].append(name)
                row["spans"].append(pairs)
                row["crowd"].append(False)
    present = [name for _, name, _ in named]
    row["neg_names"] = line_absent_names(content, names, present, caption, where, findings.add)
    return row


def _frame(path: Path, size: tuple[int, int] | None, places: _Places, findings: StrictFindings) -> Frame | None:
    """Return what a line's boxes are pixels of, or None if its image cannot be used."""
    name = shorten(path.name)
    if is_file(path):
        try:
            stored, orientation = read_header(path)
        # A damaged file makes the decoders raise exceptions of almost any type.
        except Exception as error:
            if places.need_files and places.check_damage:
                findings.add(UNREADABLE, f"{name}: {reason(error)}")
                return None
        else:
            return find_frame(size, stored, orientation, places.options, name, findings.add)
    elif places.need_files:
        findings.add(MISSING, str(path))
        return None
    else:
        findings.add("trusted sizes", name)
    if size is None:
        raise ValueError("it has no width and height that can be used, and its image cannot be read to tell them")
    return Frame(*size)


def _all_rows(annotations: str, places: _Places, names: Mapping[int, str], captions: bool) -> Iterator[dict[str, Any]]:
    findings = reader_findings(annotations, places.options)
    num_lines, num_unknown, first_fault, first_unknown = 0, 0, "", ""
    for number, line in odvg_lines(Path(annotations)):
        num_lines += 1
        try:
            row = _row(line, number, places, names, captions, findings)
        except FaultError as error:
            why = describe(error.kind, error.example)
            raise ValueError(_refusal(annotations, number, why)) from None
        except _MixedLinesError as error:
            raise ValueError(_refusal(annotations, number, str(error))) from None
        except ValueError as error:
            fault = _refusal(annotations, number, reason(error).removesuffix("; repair it"))
            first_fault = first_fault or fault
            if isinstance(error, UnknownLabelError):
                num_unknown, first_unknown = num_unknown + 1, first_unknown or fault
            findings.add("broken entries", f"line {number + 1}: {reason(error)}")
            continue
        if row is not None:
            yield row
    broken = findings.by_kind.get("broken entries")
    if broken is not None and broken.count == num_lines:
        raise ValueError(first_fault)
    if num_unknown > FEW * num_lines:
        raise ValueError(first_unknown)
    if places.seen.is_normalized:
        findings.add("normalized boxes", "all boxes")
    findings.log()


def _refusal(annotations: str, number: int, why: str) -> str:
    return f"Line {number + 1} of {printable(annotations)} cannot be used: {why}; repair it."


def _stream(
    annotations: str, places: _Places, names: Mapping[int, str], captions: bool, parts: list[tuple[int, int, int]]
) -> Iterator[dict[str, Any]]:
    findings = reader_findings(annotations, places.options)
    for begin, end, first in parts:
        for number, line in odvg_lines(Path(annotations), begin, end, first):
            try:
                row = _row(line, number, places, names, captions, findings)
            except ValueError as error:
                logger.warning("Line %d of %s is skipped: %s.", number + 1, printable(annotations), reason(error))
                continue
            if row is not None:
                yield row
    findings.log()


def _parts(path: Path) -> list[tuple[int, int, int]]:
    """Split a file at line ends into (first byte, end byte, number of the first line)."""
    size = path.stat().st_size
    step = max(1, size // _NUM_PARTS)
    parts: list[tuple[int, int, int]] = []
    begin, place, first, number = 0, 0, 0, 0
    with path.open("rb") as file:
        for line in file:
            place, number = place + len(line), number + 1
            if place - begin >= step:
                parts.append((begin, place, first))
                begin, first = place, number
    return [*parts, (begin, size, first)] if begin < size else parts
