"""What is wrong with a data set, told before a training starts instead of in its midst."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from tqdm import tqdm

from ..model.text_prompt import shorten
from .coco import coco_image_path, image_folder, load_coco
from .formats import annotation_file, annotation_format
from .negatives import name_key
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
from .rows import LARGEST_SIDE, clip_box, image_path, is_file, parse_box, parse_integer, parse_text, reason

# How far a box may leave its picture, in pixels: the rounding of annotation tools.
_TOLERANCE = 1.0

# The EXIF tag of how a camera was held, and its values for a picture on its side.
_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)

UNREADABLE = "unreadable files"
"""The fault of pictures that a training may pass over."""

_ERRORS = {
    "broken entries": "cannot be read",
    "missing files": "are not in the images' folder, which --images names",
    UNREADABLE: "are no pictures, or damaged",
    "wrong sizes": "have another size than the annotations say, so boxes may not fit",
    "broken boxes": "are not four finite numbers",
    "unknown classes": "are named by no category",
    "unknown images": "belong to no image of the file",
    "repeated image ids": "stand for several images",
    "repeated category ids": "stand for several categories",
    "broken phrases": "do not tell where in the caption they stand",
    "broken names": "have nothing in them",
}
_WARNINGS = {
    "boxes outside": "leave their picture and are cut at its edge, or left out where nothing remains",
    "boxes without area": "are left out",
    "empty classes": "have no box",
    "alike names": "differ in case or blanks only and are one name to the model",
    "repeated names": "are several categories and one name to the model",
    "names with marks": "hold a period or question mark, which is read as a blank",
    "repeated files": "stand for several images",
    "images without boxes": "teach only what is absent",
}


@dataclass
class Finding:
    """One kind of fault.

    Attributes:
        kind: Its name, as "missing files".
        is_error: Whether it stops a training; a warning does not.
        count: How often it was found.
        examples: Some of them.
    """

    kind: str
    is_error: bool
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        shown_ones = "; ".join(self.examples) + ("; ..." if self.count > len(self.examples) else "")
        return f"{self.count} {self.kind}: {(_ERRORS | _WARNINGS)[self.kind]} ({shown_ones})"


@dataclass
class DatasetReport:
    """What a data set holds and what is wrong with it.

    Attributes:
        path: The annotation file.
        format: "coco" or "odvg".
        num_images: Images, or lines.
        num_boxes: Boxes, those that are left out too.
        boxes_per_name: Boxes of each name; of grounding, of each phrase.
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
        """Faults that stop a training."""
        return [finding for finding in self.findings if finding.is_error]

    @property
    def warnings(self) -> list[Finding]:
        """Faults that do not."""
        return [finding for finding in self.findings if not finding.is_error]

    def raise_for_errors(self, except_for: Collection[str] = ()) -> None:
        """Stop where there is an error.

        Args:
            except_for: Kinds of fault that the caller can live with.

        Raises:
            ValueError: One sentence on the first error.
        """
        errors = [finding for finding in self.errors if finding.kind not in except_for]
        if errors:
            more = f" and {len(errors) - 1} other kinds of fault" if len(errors) > 1 else ""
            raise ValueError(f"{self.path} cannot be trained on: {errors[0]}{more}; repair it.")

    def as_dict(self) -> dict[str, Any]:
        """The report as json takes it."""
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
    """Look through annotations and pictures for all that a training would stumble over.

    Args:
        path: As `open_dataset` takes it.
        images: Folder of the photographs; by default as `open_dataset` finds it.
        decode: Also decode every picture to its end, which finds damaged ones and takes as long as an epoch's loading;
            otherwise only its head is read.
        max_examples: Of each fault.

    Returns:
        The report.

    Raises:
        ValueError: There are no annotations at all.
    """
    file = annotation_file(path)
    form = annotation_format(file)
    check = _Check(image_folder(file, images), decode, max_examples)
    if form == "coco":
        _check_coco(check, file)
    else:
        _check_odvg(check, file)
    check.names_at_the_end()
    order = [*_ERRORS, *_WARNINGS]
    findings = sorted(check.findings.values(), key=lambda finding: order.index(finding.kind))
    return DatasetReport(file, form, check.num_images, check.num_boxes, dict(check.boxes_per_name), findings)


class _Check:
    """Faults found so far."""

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
        """Count a fault."""
        finding = self.findings.setdefault(kind, Finding(kind, kind in _ERRORS))
        finding.count += 1
        if len(finding.examples) < self.max_examples:
            finding.examples.append(example)

    def picture(self, path: Path, width: int, height: int) -> None:
        """Look at a picture's file."""
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
                # Boxes are pixels of the picture as people see it.
                turned = picture.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE
                size = picture.size[::-1] if turned else picture.size
                if self.decode:
                    ImageOps.exif_transpose(picture).load()
        # Decoders raise whatever a damaged file leads them to.
        except Exception as error:
            self.add(UNREADABLE, f"{shorten(name)}: {reason(error)[:80]}")
            return
        if size != (width, height):
            how = ", turned by its EXIF mark" if turned else ""
            self.add("wrong sizes", f"{shorten(name)}: {size[0]}x{size[1]}{how}, not {width}x{height}")

    def box(self, box: tuple[float, float, float, float], width: int, height: int, where: str) -> None:
        """Look at a box, xyxy as annotated."""
        x1, y1, x2, y2 = box
        numbers = ", ".join(f"{value:g}" for value in box)
        if x2 <= x1 or y2 <= y1:
            self.add("boxes without area", f"{where}: {numbers}")
            return
        outside = min(x1, y1) < -_TOLERANCE or x2 > width + _TOLERANCE or y2 > height + _TOLERANCE
        if outside or clip_box(box, width, height) is None:
            self.add("boxes outside", f"{where}: {numbers} in {width}x{height}")

    def name(self, name: str, where: str) -> None:
        """Register a name of the data set, which may turn out to have no box."""
        try:
            parse_text(name, where)
        except ValueError:
            self.add("broken names", f"{where}: {shorten(name)}")
            return
        self.boxes_per_name.setdefault(name, 0)

    def names_at_the_end(self) -> None:
        """Look at all names together."""
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
            # A name that is none was complained of already.
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
