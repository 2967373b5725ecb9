"""A report on all faults of a data set that would stop or harm training, made before training starts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from tqdm import tqdm

from ..error_text import reason
from ..model.text_prompt import name_key, shorten
from .coco import coco_image_path, image_folder, load_coco
from .formats import annotation_file, annotation_format
from .odvg import (
    MIXED,
    entry_boxes,
    entry_name,
    has_captions,
    line_entries,
    odvg_lines,
    odvg_names,
    parse_line,
    read_label_map,
)
from .rows import LARGEST_SIDE, clip_box, image_path, is_file, parse_box, parse_integer, parse_text

# Pixels by which a box may extend beyond its image, for the rounding of annotation tools.
_TOLERANCE = 1.0

# EXIF tag of the camera's orientation, and its values that swap width and height.
_ORIENTATION = 0x0112
_SWAPS_SIDES = (5, 6, 7, 8)

UNREADABLE = "unreadable files"
"""Kind of fault of damaged images, which training can be told to skip."""

_ERRORS = {
    "broken entries": "cannot be parsed",
    "missing files": "not found in the image folder, which --images sets",
    UNREADABLE: "not an image, or damaged",
    "wrong sizes": "differ in size from their annotation, so boxes may not fit",
    "broken boxes": "not four finite numbers",
    "unknown classes": "have no name in the file",
    "unknown images": "refer to an image that the file does not list",
    "repeated image ids": "used for several images",
    "repeated category ids": "used for several categories",
    "broken phrases": "have no clear position in the caption",
    "broken names": "empty or not text",
}
_WARNINGS = {
    "boxes outside": "extend beyond their image and are clipped to it, or dropped if nothing remains",
    "boxes without area": "dropped",
    "empty classes": "have no box",
    "alike names": "differ only in case or blanks and are one name to the model",
    "repeated names": "used for several categories and are one name to the model",
    "names with marks": "contain a period or question mark, which is read as a blank",
    "repeated files": "listed as several images",
    "images without boxes": "provide negatives only",
}


@dataclass
class Finding:
    """One kind of fault in a data set.

    Attributes:
        kind: Name of the kind, such as "missing files".
        is_error: Whether the fault stops training; a warning does not.
        count: Number of occurrences.
        examples: Descriptions of the first occurrences.
    """

    kind: str
    is_error: bool
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        examples = "; ".join(self.examples) + ("; ..." if self.count > len(self.examples) else "")
        return f"{self.count} {self.kind}: {(_ERRORS | _WARNINGS)[self.kind]} ({examples})"


@dataclass
class DatasetReport:
    """Contents and faults of a data set.

    Attributes:
        path: The annotation file.
        format: "coco" or "odvg".
        num_images: Number of images of a COCO file, or of lines of an ODVG file.
        num_boxes: Number of annotated boxes, including those that training drops.
        boxes_per_name: Number of boxes by name; by phrase in grounding data.
        findings: Faults, errors first.
    """

    path: Path
    format: str
    num_images: int
    num_boxes: int
    boxes_per_name: dict[str, int]
    findings: list[Finding]

    @property
    def errors(self) -> list[Finding]:
        """Faults that stop training."""
        return [finding for finding in self.findings if finding.is_error]

    @property
    def warnings(self) -> list[Finding]:
        """Faults that do not stop training."""
        return [finding for finding in self.findings if not finding.is_error]

    def raise_for_errors(self, except_for: Collection[str] = ()) -> None:
        """Raise an exception if the data set has errors.

        Args:
            except_for: Kinds of fault to ignore.

        Raises:
            ValueError: There are errors; the message describes the first kind.
        """
        errors = [finding for finding in self.errors if finding.kind not in except_for]
        if errors:
            more = f" and {len(errors) - 1} other kinds of fault" if len(errors) > 1 else ""
            raise ValueError(f"{self.path} cannot be trained on: {errors[0]}{more}; repair it.")

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts and lists, ready for json."""
        return {
            "path": str(self.path),
            "format": self.format,
            "num_images": self.num_images,
            "num_boxes": self.num_boxes,
            "boxes_per_name": self.boxes_per_name,
            "findings": [vars(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        names = len(self.boxes_per_name)
        lines = [f"{self.path}: {self.num_images} images, {self.num_boxes} boxes, {names} names"]
        lines += [f"  {'error' if finding.is_error else 'warning'}: {finding}" for finding in self.findings]
        return "\n".join(lines if self.findings else [*lines, "  nothing is wrong with it"])


def check_dataset(
    path: str | Path, images: str | Path | None = None, *, decode: bool = False, max_examples: int = 3
) -> DatasetReport:
    """Check annotations and images for faults that would stop or harm training.

    Args:
        path: The annotation file or its folder, as for `open_dataset`.
        images: Folder of the images; found as `open_dataset` finds it by default.
        decode: Whether to decode every image completely. This finds damaged images but takes as long as loading them
            for one epoch; by default only the header is read.
        max_examples: Maximum number of examples listed for each kind of fault.

    Returns:
        The report.

    Raises:
        ValueError: There is no annotation file, or its format is unknown.
    """
    file = annotation_file(path)
    form = annotation_format(file)
    check = _Check(image_folder(file, images), decode, max_examples)
    if form == "coco":
        _check_coco(check, file)
    else:
        _check_odvg(check, file)
    check.finish_names()
    order = [*_ERRORS, *_WARNINGS]
    findings = sorted(check.findings.values(), key=lambda finding: order.index(finding.kind))
    return DatasetReport(file, form, check.num_images, check.num_boxes, dict(check.boxes_per_name), findings)


class _Check:
    """Collects the faults of one data set while it is read."""

    def __init__(self, folder: Path, decode: bool, max_examples: int) -> None:
        self.folder = folder
        self.decode = decode
        self.max_examples = max_examples
        self.findings: dict[str, Finding] = {}
        self.num_images = 0
        self.num_boxes = 0
        self.boxes_per_name: Counter[str] = Counter()
        self.are_phrases = False
        self._files: set[str] = set()

    def add(self, kind: str, example: str) -> None:
        """Count one fault."""
        finding = self.findings.setdefault(kind, Finding(kind, kind in _ERRORS))
        finding.count += 1
        if len(finding.examples) < self.max_examples:
            finding.examples.append(example)

    def picture(self, path: Path, width: int, height: int) -> None:
        """Check that an image file exists, can be read and has the annotated size."""
        name = os.path.relpath(path, self.folder)
        if name in self._files:
            self.add("repeated files", shorten(name))
            return
        self._files.add(name)
        if not is_file(path):
            self.add("missing files", shorten(name))
            return
        try:
            with Image.open(path) as picture:
                # Boxes are pixels of the upright image.
                turned = picture.getexif().get(_ORIENTATION, 1) in _SWAPS_SIDES
                size = picture.size[::-1] if turned else picture.size
                if self.decode:
                    ImageOps.exif_transpose(picture).load()
        # A damaged file makes the decoders raise exceptions of almost any type.
        except Exception as error:
            self.add(UNREADABLE, f"{shorten(name)}: {reason(error)[:80]}")
            return
        if size != (width, height):
            how = ", turned by its EXIF orientation" if turned else ""
            self.add("wrong sizes", f"{shorten(name)}: {size[0]}x{size[1]}{how}, not {width}x{height}")

    def box(self, box: tuple[float, float, float, float], width: int, height: int, where: str) -> None:
        """Check the area and the position of a box, given as annotated xyxy."""
        x1, y1, x2, y2 = box
        numbers = ", ".join(f"{value:g}" for value in box)
        if x2 <= x1 or y2 <= y1:
            self.add("boxes without area", f"{where}: {numbers}")
            return
        outside = min(x1, y1) < -_TOLERANCE or x2 > width + _TOLERANCE or y2 > height + _TOLERANCE
        if outside or clip_box(box, width, height) is None:
            self.add("boxes outside", f"{where}: {numbers} in {width}x{height}")

    def name(self, name: str, where: str) -> None:
        """Register a name of the data set; one that gets no box is reported by `finish_names`."""
        try:
            parse_text(name, where)
        except ValueError:
            self.add("broken names", f"{where}: {shorten(name)}")
            return
        self.boxes_per_name.setdefault(name, 0)

    def finish_names(self) -> None:
        """Check the registered names, once all boxes have been counted."""
        alike: dict[str, list[str]] = {}
        for name, count in self.boxes_per_name.items():
            alike.setdefault(name_key(name), []).append(name)
            if count == 0:
                self.add("empty classes", shorten(name))
            if not self.are_phrases and ("." in name or "?" in name):
                self.add("names with marks", shorten(name))
        for spellings in alike.values():
            if len(spellings) > 1 and not self.are_phrases:
                self.add("alike names", " = ".join(map(shorten, spellings)))


def _check_coco(check: _Check, file: Path) -> None:
    content = load_coco(file)
    names: dict[int, Any] = {}
    for category in content["categories"]:
        where = f"category {shorten(category.get('id'))}"
        try:
            number = parse_integer(category.get("id"), "its id", -LARGEST_SIDE)
        except ValueError as error:
            check.add("broken entries", f"{where}: {error}")
            continue
        name = category.get("name")
        if name in names.values():
            check.add("repeated names", shorten(name))
        if number in names:
            check.add("repeated category ids", str(number))
        names[number] = name
        check.name(name, where)
    sizes: dict[int, tuple[int, int]] = {}
    for place, image in enumerate(tqdm(content["images"], desc="check pictures", disable=None, leave=False)):
        check.num_images += 1
        try:
            number = parse_integer(image.get("id"), "its id", -(2**63))
            size = tuple(parse_integer(image.get(side), f"its {side}", 1, LARGEST_SIDE) for side in ("width", "height"))
            path = coco_image_path(image, check.folder)
        except ValueError as error:
            check.add("broken entries", f"image {place}: {error}")
            continue
        if number in sizes:
            check.add("repeated image ids", str(number))
        sizes[number] = (size[0], size[1])
        check.picture(path, *sizes[number])
    _check_annotations(check, content["annotations"], sizes, names)


def _check_annotations(
    check: _Check, annotations: list[dict[str, Any]], sizes: dict[Any, tuple[int, int]], names: dict[Any, Any]
) -> None:
    without = set(sizes)
    for annotation in annotations:
        check.num_boxes += 1
        where = f"annotation {shorten(annotation.get('id'))}"
        image, category = annotation.get("image_id"), annotation.get("category_id")
        size = sizes.get(image) if isinstance(image, (int, float)) else None
        if isinstance(category, (int, float)) and category in names:
            # A name that is not text was already reported with its category.
            if isinstance(name := names[category], str):
                check.boxes_per_name[name] += 1
        else:
            check.add("unknown classes", f"{where}: category_id {shorten(category)}")
        try:
            box = parse_box(annotation.get("bbox"), "xywh")
        except ValueError as error:
            check.add("broken boxes", f"{where}: {error}")
            continue
        if size is None:
            check.add("unknown images", f"{where}: image_id {shorten(image)}")
            continue
        check.box(box, *size, where)
        without.discard(image)
    for number in sorted(without):
        check.add("images without boxes", str(number))


def _check_odvg(check: _Check, file: Path) -> None:
    names, captions = read_label_map(file, None), has_captions(file)
    check.are_phrases = captions
    for name in odvg_names(file) or []:
        check.name(name, "label map")
    for name, count in Counter(names.values()).items():
        if count > 1:
            check.add("repeated names", shorten(name))
    for number, line in tqdm(odvg_lines(file), desc="check pictures", disable=None, leave=False):
        check.num_images += 1
        where = f"line {number + 1}"
        try:
            content = parse_line(line)
            name = parse_text(content.get("filename"), "its filename")
            width, height = (
                parse_integer(content.get(side), f"its {side}", 1, LARGEST_SIDE) for side in ("width", "height")
            )
        except ValueError as error:
            check.add("broken entries", f"{where}: {error}")
            continue
        check.picture(image_path(check.folder, name), width, height)
        try:
            entries, caption = line_entries(content)
            if caption is not None and not captions:
                raise ValueError(MIXED)
        except ValueError as error:
            check.add("broken entries", f"{where}: {error}")
            continue
        if not entries:
            check.add("images without boxes", shorten(name))
        for entry in entries:
            _check_entry(check, entry, names, caption, (width, height), where)


def _check_entry(
    check: _Check,
    entry: Mapping[str, Any],
    names: Mapping[int, str],
    caption: str | None,
    size: tuple[int, int],
    where: str,
) -> None:
    label = None
    try:
        label, _ = entry_name(entry, names, caption)
    except ValueError as error:
        check.add("unknown classes" if caption is None else "broken phrases", f"{where}: {error}")
    try:
        boxes = entry_boxes(entry)
    except ValueError as error:
        check.add("broken boxes", f"{where}: {error}")
        return
    for box in boxes:
        check.num_boxes += 1
        if label is not None:
            check.boxes_per_name[label] += 1
        check.box(box, *size, where)
