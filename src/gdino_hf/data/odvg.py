"""ODVG json lines (Open-GroundingDino, MM-Grounding-DINO): detection or grounding annotations, one image per line."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..error_text import reason
from ..model.caption_prompt import check_pair
from ..model.text_prompt import shorten
from .annotation_options import DEFAULT_OPTIONS, AnnotationOptions
from .coco import reader_findings
from .coco_content import first_existing, image_folders
from .faults import MISSING, StrictFindings
from .frames import frame_of_file
from .rows import (
    LARGEST_SIDE,
    clip_box,
    image_path,
    is_file,
    make_dataset,
    make_stream,
    parse_box,
    parse_integer,
    parse_text,
    read_json,
)

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

MIXED = "it is a grounding line, but the first line is a detection line; keep them in two files"

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
        streaming: Read the file line by line while iterating. A line that cannot be used, or whose image is missing,
            is then logged and skipped instead of stopping a training run.
        options: Conventions of the file, as in `read_coco`.

    Returns:
        One row per line, as in `read_coco`; `image_id` is the line's number from 0. If the first line is a grounding
        line, rows also have `caption` and `spans`, and `names` holds the phrases.

    Raises:
        ValueError: A line cannot be used or its image does not exist; `check_dataset` lists all such lines.
    """
    names = read_label_map(annotations, label_map)
    folders = [str(folder) for folder in image_folders(annotations, images)]
    captions = has_captions(annotations)
    arguments: dict[str, Any] = {
        "annotations": str(annotations),
        "places": _Places(tuple(folders), options),
        "names": names,
        "captions": captions,
    }
    if streaming:
        return make_stream(_stream, captions, {**arguments, "parts": _parts(Path(annotations))})
    return make_dataset(_all_rows(**arguments), captions)


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
        ValueError: A line cannot be used.
    """
    places = _Places(tuple(str(folder) for folder in image_folders(annotations, images)), options)
    names = read_label_map(annotations, None)
    yield from _all_rows(str(annotations), places, names, has_captions(annotations), must_exist=False)


def odvg_names(annotations: str | Path, label_map: str | Path | Mapping[Any, str] | None = None) -> list[str] | None:
    """Return the names of an ODVG detection file.

    Args:
        annotations: The json lines file. All of it is read if there is no label map.
        label_map: Names by label number, as in `read_odvg`.

    Returns:
        The names in the order of their label numbers, or None if the file has no detection lines.

    Raises:
        ValueError: The file or its label map cannot be read.
    """
    names = read_label_map(annotations, label_map)
    if names:
        return [names[number] for number in sorted(names)]
    found: dict[str, float] = {}
    for _, line in odvg_lines(Path(annotations)):
        try:
            instances = parse_line(line).get("detection", {}).get("instances", [])
            for item in instances:
                label = item.get("label")
                order = float(label) if isinstance(label, int) else float("inf")
                found.setdefault(parse_text(item.get("category"), "category"), order)
        except (ValueError, AttributeError, TypeError, OverflowError):
            # Reading the rows reports this line.
            continue
    return sorted(found, key=lambda name: found[name]) or None


def has_captions(annotations: str | Path) -> bool:
    """Return whether an ODVG file holds captions, judging by its first valid line.

    Args:
        annotations: The json lines file.

    Returns:
        True for grounding data (captions and phrases), False for detection data (names).

    Raises:
        ValueError: The file cannot be read, or has no valid line.
    """
    for _, line in odvg_lines(Path(annotations)):
        try:
            content = parse_line(line)
        except ValueError:
            continue
        if "grounding" in content or "detection" in content:
            return "grounding" in content
    raise ValueError(f'{annotations} is not an ODVG file: none of its lines has "detection" or "grounding".')


def read_label_map(annotations: str | Path, label_map: str | Path | Mapping[Any, str] | None) -> dict[int, str]:
    """Return the names of an ODVG file's label numbers.

    Args:
        annotations: The json lines file.
        label_map: Names by label number or the path of a json file with them, as in `read_odvg`.

    Returns:
        Label number to name; empty if there is no label map.

    Raises:
        ValueError: The label map cannot be read, or is not a dict of numbers to names.
    """
    if label_map is None:
        beside = Path(annotations).parent / "label_map.json"
        label_map = beside if is_file(beside) else {}
    content = label_map if isinstance(label_map, Mapping) else read_json(label_map, "a label map")
    if not isinstance(content, Mapping):
        raise ValueError(f"The label map {label_map} holds a {type(content).__name__}, not a dict of numbers to names.")
    names = {}
    for number, name in content.items():
        if not str(number).strip().isdecimal():
            raise ValueError(f"The label map has the key {shorten(number)}; its keys must be whole numbers from 0.")
        try:
            names[int(number)] = parse_text(name, f"the name of {number}")
        except ValueError as error:
            raise ValueError(f"The label map cannot be used: {error}; repair it.") from None
    return names


def parse_line(line: bytes) -> dict[str, Any]:
    """Parse one line of an ODVG file.

    Args:
        line: The line as UTF-8 bytes.

    Returns:
        The parsed dict.

    Raises:
        ValueError: The line is not valid json, or not a dict.
    """
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid json ({reason(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict")
    return content


def locate_phrase(caption: str, phrase: str) -> list[int]:
    """Find a phrase in a caption, provided that it occurs exactly once.

    Args:
        caption: The caption.
        phrase: The phrase, compared without case and as whole words: "cat" does not occur in "cattle".

    Returns:
        The phrase's [start, end) characters.

    Raises:
        ValueError: The phrase occurs several times or not at all.
    """
    # Letters and digits of any script continue a word; an underscore does not.
    found = list(re.finditer(rf"(?<![^\W_]){re.escape(phrase.strip())}(?![^\W_])", caption, re.IGNORECASE))
    if len(found) != 1:
        raise ValueError(
            f"the phrase {shorten(phrase)} has no tokens_positive and stands {len(found)} times in the caption "
            f"{shorten(caption)}"
        )
    return [found[0].start(), found[0].end()]


def line_entries(content: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], str | None]:
    """Return the annotations of a parsed line.

    Args:
        content: The line, from `parse_line`.

    Returns:
        The instances and None for a detection line, or the regions and their caption for a grounding line.

    Raises:
        ValueError: The line has neither instances nor regions, or its caption is missing.
    """
    if "grounding" in content:
        regions = _dicts(content["grounding"], "grounding", "regions")
        return regions, parse_text(content["grounding"].get("caption"), "the caption")
    return _dicts(content.get("detection"), "detection", "instances"), None


def entry_boxes(entry: Mapping[str, Any]) -> list[tuple[float, float, float, float]]:
    """Return the boxes of an instance or a region.

    Args:
        entry: Instance or region, from `line_entries`.

    Returns:
        Boxes as annotated, xyxy in pixels; a region may have several.

    Raises:
        ValueError: A box is not four finite numbers.
    """
    bbox: Any = entry.get("bbox")
    several = isinstance(bbox, list) and len(bbox) > 0 and isinstance(bbox[0], list)
    return [parse_box(box, "xyxy") for box in (bbox if several else [bbox])]


def entry_name(entry: Mapping[str, Any], names: Mapping[int, str], caption: str | None) -> tuple[str, list[list[int]]]:
    """Return the name of an instance, or the phrase of a region and its place in the caption.

    Args:
        entry: Instance or region, from `line_entries`.
        names: Label number to name.
        caption: Caption of the region; None for an instance.

    Returns:
        The name or phrase, and the phrase's [start, end) characters in the caption; empty for an instance.

    Raises:
        ValueError: The label number has no name, or the phrase's place in the caption is unknown.
    """
    if caption is not None:
        phrase = entry.get("phrase")
        # Datasets publish a phrase that is interrupted by other words as a list of its pieces.
        pieces = [
            parse_text(piece, "a phrase") for piece in (phrase if isinstance(phrase, list) and phrase else [phrase])
        ]
        return " ".join(pieces), _pairs(entry.get("tokens_positive"), caption, pieces)
    if entry.get("category") is not None:
        return parse_text(entry["category"], "a category"), []
    number = parse_integer(entry.get("label"), "an instance has no category and its label", 0)
    if number not in names:
        raise ValueError(f"label {number} is not in the label map and has no category")
    return names[number], []


def _dicts(part: Any, name: str, entries: str) -> list[Mapping[str, Any]]:
    if not isinstance(part, Mapping):
        raise ValueError(f'it has no dict named "{name}"')
    items = part.get(entries, [])
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise ValueError(f"its {entries} are not a list of dicts")
    return items


def _pairs(given: Any, caption: str, pieces: Sequence[str]) -> list[list[int]]:
    if not given:
        return [locate_phrase(caption, piece) for piece in pieces]
    if not isinstance(given, Sequence):
        raise ValueError(f"tokens_positive is {shorten(given)}, not a list of [start, end) pairs")
    for pair in given:
        try:
            check_pair(pair, len(caption))
        except ValueError as error:
            raise ValueError(reason(error).removesuffix("; repair it")) from None
    return [list(pair) for pair in given]


@dataclass(frozen=True)
class _Places:
    """Where the images of a file are looked for, and the conventions of their sizes."""

    folders: tuple[str, ...]
    options: AnnotationOptions


def _row(
    line: bytes,
    number: int,
    places: _Places,
    names: Mapping[int, str],
    captions: bool,
    findings: StrictFindings,
    must_exist: bool = True,
) -> dict[str, Any] | None:
    """Return the row of a line, or None if its image is missing and may be skipped."""
    content = parse_line(line)
    filename = parse_text(content.get("filename"), "its filename")
    path = first_existing([image_path(folder, filename) for folder in places.folders])
    width = parse_integer(content.get("width"), "its width", 1, LARGEST_SIDE)
    height = parse_integer(content.get("height"), "its height", 1, LARGEST_SIDE)
    if must_exist and not is_file(path):
        if places.options.unreadable == "skip":
            findings.add(MISSING, str(path))
            return None
        raise ValueError(f"its image {path} does not exist")
    frame = frame_of_file(path, (width, height), places.options, findings.add)
    width, height = frame.width, frame.height
    row: dict[str, Any] = {"image": str(path), "image_id": number, "width": width, "height": height}
    row |= {"boxes": [], "names": [], "crowd": [], "spans": []}
    entries, row["caption"] = line_entries(content)
    if row["caption"] is not None and not captions:
        raise ValueError(MIXED)
    for entry in entries:
        name, pairs = entry_name(entry, names, row["caption"])
        try:
            boxes = entry_boxes(entry)
        except ValueError as error:
            findings.add("broken boxes", f"line {number + 1}: {error}")
            continue
        for box in boxes:
            inside = clip_box(frame.box(box), width, height)
            if inside is not None:
                row["boxes"].append(inside)
                row["names"].append(name)
                row["spans"].append(pairs)
                row["crowd"].append(False)
    return row


def _all_rows(
    annotations: str, places: _Places, names: Mapping[int, str], captions: bool, must_exist: bool = True
) -> Iterator[dict[str, Any]]:
    findings = reader_findings(annotations, places.options)
    for number, line in odvg_lines(Path(annotations)):
        try:
            row = _row(line, number, places, names, captions, findings, must_exist)
        except ValueError as error:
            why = reason(error).removesuffix("; repair it")
            raise ValueError(f"Line {number + 1} of {annotations} cannot be used: {why}; repair it.") from None
        if row is not None:
            yield row
    findings.log()


def _stream(
    annotations: str, places: _Places, names: Mapping[int, str], captions: bool, parts: list[tuple[int, int, int]]
) -> Iterator[dict[str, Any]]:
    findings = reader_findings(annotations, places.options)
    for begin, end, first in parts:
        for number, line in odvg_lines(Path(annotations), begin, end, first):
            try:
                row = _row(line, number, places, names, captions, findings)
            except ValueError as error:
                logger.warning("Line %d of %s is skipped: %s.", number + 1, annotations, error)
                continue
            if row is not None:
                yield row
    findings.log()


def odvg_lines(path: Path, begin: int = 0, end: int | None = None, first: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file that are not blank.

    Args:
        path: The file.
        begin: Byte offset to start from, which must be the beginning of a line.
        end: Byte offset to stop at; a line that begins before it is read completely. None reads to the end.
        first: Number of the line at `begin`.

    Yields:
        The number and the bytes of each line.

    Raises:
        ValueError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(begin)
            place, number = begin, first
            while (end is None or place < end) and (line := file.readline()):
                place += len(line)
                if number == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line
                number += 1
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({reason(error)}).") from error


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
