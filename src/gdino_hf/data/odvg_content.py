"""The lines of ODVG files and what they hold: names, captions, phrases and boxes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..error_text import reason
from ..model.caption_prompt import check_pair
from ..model.printable import printable
from ..model.text_prompt import name_key, shorten
from .absent_names import IDS, NAMES, absent_names, check_absent_names, has_absent_names, report_unread
from .faults import Report
from .rows import is_file, parse_box, parse_integer, parse_line, parse_text, read_json

MIXED = "it is a grounding line, but the first line is a detection line; keep them in two files"


class UnknownLabelError(ValueError):
    """A label number has no name."""


def odvg_names(annotations: str | Path, label_map: str | Path | Mapping[Any, str] | None = None) -> list[str] | None:
    """Return the names of an ODVG detection file.

    Args:
        annotations: The json lines file. All of it is read if there is no label map.
        label_map: Names by label number, as in `read_odvg`.

    Returns:
        The distinct names in the order of their label numbers, or None if the file has no detection lines. Spellings
        that differ in case or blanks are one name.

    Raises:
        ValueError: The file or its label map cannot be read.
    """
    names = read_label_map(annotations, label_map)
    if names:
        return _distinct(names[number] for number in sorted(names))
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
    return _distinct(sorted(found, key=lambda name: found[name])) or None


def _distinct(names: Iterable[str]) -> list[str]:
    """Return the first spelling of each name."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(name_key(name), name)
    return list(first.values())


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
    raise ValueError(f'{printable(annotations)} is not an ODVG file: none of its lines has "detection" or "grounding".')


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
        raise ValueError(
            f"The label map {printable(label_map)} holds a {type(content).__name__}, not a dict of numbers to names."
        )
    names = {}
    for number, name in content.items():
        if not str(number).strip().isdecimal():
            raise ValueError(f"The label map has the key {shorten(number)}; its keys must be whole numbers from 0.")
        try:
            names[int(number)] = parse_text(name, f"the name of {number}")
        except ValueError as error:
            raise ValueError(f"The label map cannot be used: {printable(error)}; repair it.") from None
    return names


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


def line_absent_names(
    content: Mapping[str, Any],
    names: Mapping[int, str],
    present: Iterable[str],
    caption: str | None,
    where: str,
    report: Report,
    classes: Collection[str] | None = None,
) -> list[str] | None:
    """Return the names that a line's image is known not to contain, and report what is wrong with them.

    Args:
        content: The line, from `parse_line`; the names stand in it or in its "detection".
        names: Label number to name.
        present: Names of its boxes.
        caption: The line's caption, beside which such names are not read; None for a detection line.
        where: Where the line is, for faults.
        report: Function that faults are passed to.
        classes: All classes of the file, in the form of `name_key`; None does not compare them.

    Returns:
        The names; None if the line does not say.
    """
    inner = content.get("detection" if caption is None else "grounding")
    fields = {**(inner if isinstance(inner, Mapping) else {}), **content}
    if caption is not None:
        report_unread(fields, where, report, read=())
        return None
    report_unread(fields, where, report)
    if not has_absent_names(fields):
        return None
    absent = absent_names(fields, names, where, report)
    return check_absent_names(absent, present, classes, where, report)


def says_absent_names(annotations: str | Path) -> bool:
    """Return whether some line of an ODVG file says which names are absent from its image.

    Args:
        annotations: The json lines file, which is read as a whole.

    Raises:
        ValueError: The file cannot be read.
    """
    fields = [f'"{field}"'.encode() for field in (NAMES, IDS)]
    return any(field in line for _, line in odvg_lines(Path(annotations)) for field in fields)


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
        raise UnknownLabelError(f"label {number} is not in the label map and has no category")
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
        raise ValueError(f"{printable(path)} cannot be read ({reason(error)}).") from error
