"""ODVG json lines (Open-GroundingDino, MM-Grounding-DINO): detection and grounding, one picture a line."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..model.caption_prompt import check_pair
from ..model.text_prompt import shorten
from .coco import image_folder
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
    reason,
)

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

MIXED = "it is one of grounding, but the first line is one of detection; keep them in two files"

# Parts of a file that the workers of a data loader share among themselves.
_NUM_PARTS = 64


def read_odvg(
    annotations: str | Path,
    images: str | Path | None = None,
    label_map: str | Path | Mapping[Any, str] | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Read ODVG json lines; photographs are decoded when a row is read, not before.

    A line is {"filename", "width", "height"} with "detection": {"instances": [{"bbox" xyxy, "label", "category"}]} or
    "grounding": {"caption", "regions": [{"bbox", "phrase", "tokens_positive"}]}; a region's bbox may be a list of
    boxes, its phrase a list of pieces. tokens_positive are [start, end) characters of the caption; a phrase without
    them must stand in the caption once and only once, as a word of its own.

    Args:
        annotations: The json lines.
        images: Folder of the photographs; the folder `images` beside the file by default, or its own.
        label_map: Name of each label number, {"0": "cat", ...}, or its json file, for instances without a category;
            `label_map.json` beside the file by default.
        streaming: Read line by line as the data set is walked through. A line that cannot be used, or whose photograph
            is missing, is then named in the log and left out instead of stopping a training in its midst.

    Returns:
        One row per line: as `read_coco` gives, `image_id` being the number of the line from 0, and where the first
        line is one of grounding, `caption` and `spans` besides; `names` are then the phrases.

    Raises:
        ValueError: A line cannot be used or names a photograph that does not exist; `check_dataset` lists all of them.
    """
    names = read_label_map(annotations, label_map)
    folder = image_folder(annotations, images)
    captions = has_captions(annotations)
    arguments: dict[str, Any] = {
        "annotations": str(annotations),
        "folder": str(folder),
        "names": names,
        "captions": captions,
    }
    if streaming:
        return make_stream(_stream, captions, {**arguments, "parts": _parts(Path(annotations))})
    return make_dataset(_all_rows(**arguments), captions)


def odvg_rows(annotations: str | Path, images: str | Path | None = None) -> Iterator[dict[str, Any]]:
    """The rows of `read_odvg` with the path of each photograph, which need not exist, instead of the picture.

    Args:
        annotations: The json lines.
        images: As in `read_odvg`.

    Yields:
        One row per line.

    Raises:
        ValueError: A line cannot be used.
    """
    names, folder = read_label_map(annotations, None), image_folder(annotations, images)
    yield from _all_rows(str(annotations), str(folder), names, has_captions(annotations), must_exist=False)


def odvg_names(annotations: str | Path, label_map: str | Path | Mapping[Any, str] | None = None) -> list[str] | None:
    """The names of an ODVG detection file.

    Args:
        annotations: The json lines. They are all read where there is no label map.
        label_map: As in `read_odvg`.

    Returns:
        The names in the order of their numbers, or None where no line is one of detection.

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
            # Whoever reads the rows is told about this line.
            continue
    return sorted(found, key=lambda name: found[name]) or None


def has_captions(annotations: str | Path) -> bool:
    """Whether the first line of an ODVG file that can be read is one of grounding.

    Args:
        annotations: The json lines.

    Returns:
        True for captions and phrases, False for names.

    Raises:
        ValueError: The file cannot be read, or no line of it is ODVG.
    """
    for _, line in odvg_lines(Path(annotations)):
        try:
            content = parse_line(line)
        except ValueError:
            continue
        if "grounding" in content or "detection" in content:
            return "grounding" in content
    raise ValueError(f'{annotations} is not an ODVG file: no line of it has "detection" or "grounding".')


def read_label_map(annotations: str | Path, label_map: str | Path | Mapping[Any, str] | None) -> dict[int, str]:
    """What an ODVG file's label numbers mean.

    Args:
        annotations: The json lines.
        label_map: As in `read_odvg`.

    Returns:
        Names by number, empty where there is no map.

    Raises:
        ValueError: The map cannot be read or holds something else.
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
            raise ValueError(f"The label map has the number {shorten(number)}; its keys must be whole numbers from 0.")
        try:
            names[int(number)] = parse_text(name, f"the name of {number}")
        except ValueError as error:
            raise ValueError(f"The label map cannot be used: {error}; repair it.") from None
    return names


def parse_line(line: bytes) -> dict[str, Any]:
    """One line as a dict.

    Args:
        line: UTF-8.

    Returns:
        What it holds.

    Raises:
        ValueError: It is no json or no dict.
    """
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no json ({reason(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict")
    return content


def locate_phrase(caption: str, phrase: str) -> list[int]:
    """Where a phrase stands in a caption, if there is no doubt about it.

    Args:
        caption: The text.
        phrase: Compared without case; "cat" does not stand in "cattle".

    Returns:
        [start, end) characters.

    Raises:
        ValueError: It stands there more than once or not at all.
    """
    # Letters and digits of any script end a word, an underscore does not.
    found = list(re.finditer(rf"(?<![^\W_]){re.escape(phrase.strip())}(?![^\W_])", caption, re.IGNORECASE))
    if len(found) != 1:
        raise ValueError(
            f"the phrase {shorten(phrase)} has no tokens_positive and stands {len(found)} times in the caption "
            f"{shorten(caption)}"
        )
    return [found[0].start(), found[0].end()]


def line_entries(content: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], str | None]:
    """What is annotated in a line.

    Args:
        content: A line.

    Returns:
        Its instances and None, or its regions and the caption they refer to.

    Raises:
        ValueError: It has neither, or no caption.
    """
    if "grounding" in content:
        regions = _dicts(content["grounding"], "grounding", "regions")
        return regions, parse_text(content["grounding"].get("caption"), "the caption")
    return _dicts(content.get("detection"), "detection", "instances"), None


def entry_boxes(entry: Mapping[str, Any]) -> list[tuple[float, float, float, float]]:
    """Boxes of an instance or a region.

    Args:
        entry: From `line_entries`.

    Returns:
        xyxy as annotated; a phrase may have several.

    Raises:
        ValueError: One is not four finite numbers.
    """
    bbox: Any = entry.get("bbox")
    several = isinstance(bbox, list) and len(bbox) > 0 and isinstance(bbox[0], list)
    return [parse_box(box, "xyxy") for box in (bbox if several else [bbox])]


def entry_name(entry: Mapping[str, Any], names: Mapping[int, str], caption: str | None) -> tuple[str, list[list[int]]]:
    """What an instance or a region is.

    Args:
        entry: From `line_entries`.
        names: Names by label number.
        caption: Of the line; None for an instance.

    Returns:
        Its name or phrase, and the phrase's [start, end) characters in the caption.

    Raises:
        ValueError: A number has no name, or it is not known where in the caption the phrase stands.
    """
    if caption is not None:
        phrase = entry.get("phrase")
        # A phrase that the caption interrupts is published as a list of its pieces.
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
        raise ValueError(f'it has no dict "{name}"')
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


def _row(
    line: bytes, number: int, folder: str, names: Mapping[int, str], captions: bool, must_exist: bool = True
) -> dict[str, Any]:
    content = parse_line(line)
    path = image_path(folder, parse_text(content.get("filename"), "its filename"))
    width = parse_integer(content.get("width"), "its width", 1, LARGEST_SIDE)
    height = parse_integer(content.get("height"), "its height", 1, LARGEST_SIDE)
    row: dict[str, Any] = {"image": str(path), "image_id": number, "width": width, "height": height}
    row |= {"boxes": [], "names": [], "crowd": [], "spans": []}
    entries, row["caption"] = line_entries(content)
    if row["caption"] is not None and not captions:
        raise ValueError(MIXED)
    for entry in entries:
        name, pairs = entry_name(entry, names, row["caption"])
        for box in entry_boxes(entry):
            inside = clip_box(box, width, height)
            if inside is not None:
                row["boxes"].append(inside)
                row["names"].append(name)
                row["spans"].append(pairs)
                row["crowd"].append(False)
    if must_exist and not is_file(path):
        raise ValueError(f"its photograph {path} does not exist")
    return row


def _all_rows(
    annotations: str, folder: str, names: Mapping[int, str], captions: bool, must_exist: bool = True
) -> Iterator[dict[str, Any]]:
    for number, line in odvg_lines(Path(annotations)):
        try:
            yield _row(line, number, folder, names, captions, must_exist)
        except ValueError as error:
            raise ValueError(f"Line {number + 1} of {annotations} cannot be used: {error}; repair it.") from None


def _stream(
    annotations: str, folder: str, names: Mapping[int, str], captions: bool, parts: list[tuple[int, int, int]]
) -> Iterator[dict[str, Any]]:
    for begin, end, first in parts:
        for number, line in odvg_lines(Path(annotations), begin, end, first):
            try:
                row = _row(line, number, folder, names, captions)
            except ValueError as error:
                logger.warning("Line %d of %s is left out: %s.", number + 1, annotations, error)
                continue
            yield row


def odvg_lines(path: Path, begin: int = 0, end: int | None = None, first: int = 0) -> Iterator[tuple[int, bytes]]:
    """Lines of a file that are not blank.

    Args:
        path: The file.
        begin, end: Only lines that begin at these bytes or between them; `begin` must begin one.
        first: Number of the line at `begin`.

    Yields:
        Number and bytes of each line.

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
    """(first byte, last byte, number of the first line) of parts of a file that begin and end with a line."""
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
