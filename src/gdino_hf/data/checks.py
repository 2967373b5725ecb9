"""A report on all faults of a data set that would stop or harm training, made before training starts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..error_text import reason
from ..model.option_flags import checked_flag
from ..model.picture_files import open_picture
from ..model.printable import printable
from ..model.text_prompt import name_key, shorten, split_labels
from .annotation_files import annotation_file, annotation_format, find_split
from .annotation_options import DEFAULT_OPTIONS, AnnotationOptions
from .coco_content import id_key
from .coco_file import CocoFile
from .duplicates import photographs_of_other_splits, twins
from .faults import FEW, MISSING, OUTSIDE, THIN, UNREADABLE, Finding, Findings, counted
from .frames import Box, Frame, annotated_size, find_frame, may_be_cut_off, read_header
from .image_paths import ImagePaths, OutsideError, image_folder
from .name_tokens import check_name_tokens
from .odvg_content import (
    MIXED,
    UnknownLabelError,
    entry_boxes,
    entry_name,
    has_captions,
    line_absent_names,
    line_entries,
    odvg_lines,
    odvg_names,
    read_label_map,
)
from .places import split_of, split_place
from .reading import names_with_boxes
from .rows import LARGEST_SIDE, BoxRange, is_file, parse_line, parse_text, report_box
from .stored_pictures import Picture, StoredPicture, content_or_path

# Queries of the published models: the largest number of boxes they can find in an image.
PUBLISHED_QUERIES = 900


@dataclass
class DatasetReport:
    """Contents and faults of a data set.

    Attributes:
        path: The annotation file or data set.
        format: Its form, a key of `TITLES`: "coco", "odvg", "yolo", ...
        num_images: Number of images of a COCO file, or of lines of an ODVG file.
        num_boxes: Number of annotated boxes, including those that training drops.
        boxes_per_name: Number of boxes by name, without crowds; by phrase in grounding data.
        findings: Faults, errors first.
        most_boxes: Largest number of boxes in an image, without crowds.
        groups: Names that are left out because they only group others.
    """

    path: Path
    format: str
    num_images: int
    num_boxes: int
    boxes_per_name: dict[str, int]
    findings: list[Finding]
    most_boxes: int = 0
    groups: list[str] = field(default_factory=list)

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
            more = f" and {counted(len(errors) - 1, 'other kind')} of fault" if len(errors) > 1 else ""
            raise ValueError(f"{printable(self.path)} cannot be trained on: {errors[0]}{more}; repair it.")

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
        images, boxes = counted(self.num_images, "image"), counted(self.num_boxes, "box", "boxes")
        names = counted(len(self.boxes_per_name), "name")
        lines = [f"{printable(self.path)}: {images}, {boxes}, {names}"]
        lines += [f"  {'error' if finding.is_error else 'warning'}: {finding}" for finding in self.findings]
        return "\n".join(lines if self.findings else [*lines, "  nothing is wrong with it"])


def check_dataset(
    path: str | Path,
    images: str | Path | None = None,
    *,
    decode: bool = False,
    max_examples: int = 3,
    options: AnnotationOptions = DEFAULT_OPTIONS,
    num_queries: int = PUBLISHED_QUERIES,
    tokenizer: Any = None,
) -> DatasetReport:
    """Check annotations and images for faults that would stop or harm training.

    Args:
        path: The annotation file or its folder, as for `open_dataset`.
        images: Folder of the images; found as `open_dataset` finds it by default.
        decode: Whether to decode every image completely. This finds all damaged images but takes as long as loading
            them for one epoch; by default only those are decoded that seem to be cut off.
        max_examples: Maximum number of examples listed for each kind of fault.
        options: Conventions of the file.
        num_queries: Number of boxes that the model can find in an image, its config's `num_queries`; images with more
            are listed.
        tokenizer: The model's tokenizer, which names are checked against; None for that of the published models.

    Returns:
        The report.

    Raises:
        ValueError: There is no data set, or its form is unknown.
    """
    decode = checked_flag(decode, "decode")
    file = annotation_file(path)
    form = annotation_format(file)
    check = _Check(image_folder(file, images), decode, Findings(max_examples), options, num_queries)
    if form == "odvg":
        _check_odvg(check, file, images)
    else:
        _check_coco(check, file, images)
    if check.num_images == 0:
        check.add("no usable entries", "the file lists no images")
    check.finish_names(tokenizer, _names_in_training(file))
    check.photographs(file, images)
    if "normalized boxes" in check.findings.by_kind:
        # Boxes of fractions are all thin.
        check.findings.by_kind.pop(THIN, None)
    for kind in (MISSING, UNREADABLE, OUTSIDE) if options.unreadable == "skip" else ():
        if kind in check.findings.by_kind:
            # Those are left out, as the options say, and stop nothing.
            check.findings.by_kind[kind].is_error = False
    return DatasetReport(
        path=file,
        format=form,
        num_images=check.num_images,
        num_boxes=check.num_boxes,
        boxes_per_name=dict(check.boxes_per_name),
        findings=check.findings.in_order(),
        most_boxes=check.most_boxes,
        groups=check.groups,
    )


class _Check:
    """Collects the faults of one data set while it is read."""

    def __init__(
        self, folder: Path, decode: bool, findings: Findings, options: AnnotationOptions, num_queries: int
    ) -> None:
        self.folder = folder
        self.decode = decode
        self.findings = findings
        self.add = findings.add
        self.options = options
        self.num_queries = num_queries
        self.num_images = 0
        self.num_boxes = 0
        self.most_boxes = 0
        self.boxes_per_name: Counter[str] = Counter()
        self.crowd_names: set[str] = set()
        self.are_phrases = False
        self.broken_lines: set[str] = set()
        self.unknown: list[str] = []
        self.seen = BoxRange()
        self.groups: list[str] = []
        self.paths: list[Picture] = []
        self._files: set[str] = set()

    def file(self, path: Picture) -> bool:
        """Check that an image is listed once and, if asked for, can be decoded; return whether it is new."""
        name = path.name if isinstance(path, StoredPicture) else os.path.relpath(path, self.folder)
        if name in self._files:
            self.add("repeated files", shorten(name))
            return False
        self._files.add(name)
        self.paths.append(path)
        try:
            read_header(path)
        # Unreadable headers are reported where sizes are read.
        except Exception:
            return True
        if self.decode or may_be_cut_off(path):
            try:
                open_picture(content_or_path(path), name=path.name)
            # A damaged file makes the decoders raise exceptions of almost any type.
            except Exception as error:
                self.add(UNREADABLE, f"{shorten(name)}: {reason(error)}")
                return False
        return True

    def frame(self, path: Path, size: tuple[int, int] | None) -> Frame:
        """Check that an image file exists, can be read and has the annotated size; return what its boxes are in."""
        annotated = Frame(*(size or (LARGEST_SIDE, LARGEST_SIDE)))
        name = shorten(os.path.relpath(path, self.folder))
        if not self.file(path):
            return annotated
        if not is_file(path):
            self.add(MISSING, name)
            return annotated
        try:
            stored, orientation = read_header(path)
        # A damaged file makes the decoders raise exceptions of almost any type.
        except Exception as error:
            self.add(UNREADABLE, f"{name}: {reason(error)}")
            return annotated
        return find_frame(size, stored, orientation, self.options, name, self.add)

    def boxes_of_image(self, boxes: Iterable[tuple[Box, Hashable]], path: Picture) -> None:
        """Check that no box of an image is marked twice with the same category or phrase."""
        for box, count in Counter(boxes).items():
            if count > 1:
                self.add("repeated boxes", f"{shorten(path.name)}: {count} times {', '.join(f'{x:g}' for x in box[0])}")

    def photographs(self, file: Path, images: str | Path | None) -> None:
        """Check that no photograph is listed under two names or in two splits."""
        within, across = twins(self.paths, photographs_of_other_splits(file, images, self.options))
        for kind, pairs in (("repeated photographs", within), ("shared photographs", across)):
            for pair in pairs:
                self.add(kind, " = ".join(shorten(path.name) for path in pair))

    def count(self, number: int, where: str) -> None:
        """Compare the number of boxes of an image with the model's queries."""
        self.most_boxes = max(self.most_boxes, number)
        if number > self.num_queries:
            self.add("more boxes than queries", f"{where}: {number} boxes, {self.num_queries} queries")

    def broken(self, kind: str, where: str, error: ValueError) -> None:
        """Report a line that cannot be used."""
        self.broken_lines.add(where)
        self.add(kind, f"{where}: {error}")

    def name(self, name: str, where: str) -> None:
        """Register a name of the data set; one that gets no box is reported by `finish_names`."""
        try:
            parse_text(name, where)
        except ValueError:
            self.add("broken names", f"{where}: {shorten(name)}")
            return
        self.boxes_per_name.setdefault(name, 0)

    def finish_names(self, tokenizer: Any, in_training: Collection[str]) -> None:
        """Check the registered names, once all boxes have been counted; `in_training` has boxes in the train split."""
        alike: dict[str, list[str]] = {}
        used: Counter[str] = Counter()
        for name, count in self.boxes_per_name.items():
            used[name_key(name)] += count
        for name in self.boxes_per_name:
            alike.setdefault(name_key(name), []).append(name)
            if not used[name_key(name)] and name not in self.crowd_names and name_key(name) not in in_training:
                self.add("empty classes", shorten(name))
            if not self.are_phrases and len(split_labels(name)) > 1:
                self.add("names with separators", shorten(name))
            elif not self.are_phrases and ("." in name or "?" in name):
                self.add("names with marks", shorten(name))
        for spellings in alike.values():
            if len(spellings) > 1 and not self.are_phrases:
                self.add("alike names", " = ".join(map(shorten, spellings)))
        if not self.are_phrases:
            check_name_tokens(list(self.boxes_per_name), tokenizer, self.add)


def _names_in_training(file: Path) -> frozenset[str]:
    """Return the names with boxes in the train split, as `name_key` writes them, for a file of another split.

    A validation or test split rarely has boxes of all classes, which is no fault; a train split should have them.
    """
    base, split = split_place(file)
    split = split_of(split or "") or split_of(Path(base).stem) or split_of(Path(base).parent.name)
    if split not in ("val", "test"):
        return frozenset()
    try:
        train = find_split(file, "train")
    except ValueError:
        # Whether that split can be used is no matter of this one.
        return frozenset()
    return frozenset() if train is None else names_with_boxes(train)


def _check_coco(check: _Check, path: Path, images: str | Path | None) -> None:
    file = CocoFile(path, images, check.options, check.findings)
    check.groups = file.groups
    check.num_images, check.num_boxes = len(file.content.images), len(file.content.annotations)
    for name in file.names.values():
        # Names that are not text were reported with their category.
        if name:
            check.name(name, "category")
    _check_annotation_ids(check, file)
    bar = tqdm(file.images(keep_faulty=True), "check pictures", check.num_images, disable=None, leave=False)
    for image in bar:
        check.file(image.path)
        check.boxes_of_image(zip(image.boxes, image.categories, strict=True), image.path)
        for category, crowd in zip(image.categories, image.crowd, strict=True):
            name = file.names[category]
            if crowd:
                check.crowd_names.add(name)
            elif name:
                check.boxes_per_name[name] += 1
        check.count(len(image.boxes) - sum(image.crowd), shorten(image.path.name))
        if not image.boxes:
            check.add("images without boxes", str(image.id))


def _check_annotation_ids(check: _Check, file: CocoFile) -> None:
    """Check that no id stands for several annotations; those of unknown classes are left out anyway."""
    used = [annotation for annotation in file.content.annotations if id_key(annotation.get("category_id")) in file.ids]
    ids = Counter(id_key(annotation["id"]) for annotation in used if annotation.get("id") is not None)
    for number, count in ids.items():
        if count > 1:
            check.add("repeated annotation ids", f"id {shorten(number)}: {count} annotations")


def _check_odvg(check: _Check, file: Path, images: str | Path | None) -> None:
    names, captions = read_label_map(file, None), has_captions(file)
    check.are_phrases = captions
    paths = ImagePaths(file, images, check.options)
    for name in odvg_names(file) or []:
        check.name(name, "label map")
    classes = {name_key(name) for name in check.boxes_per_name}
    for name, count in Counter(names.values()).items():
        if count > 1:
            check.add("repeated names", shorten(name))
    for number, line in tqdm(odvg_lines(file), desc="check pictures", disable=None, leave=False):
        check.num_images += 1
        where = f"line {number + 1}"
        try:
            content = parse_line(line)
            name = parse_text(content.get("filename"), "its filename")
        except ValueError as error:
            check.broken("broken entries", where, error)
            continue
        try:
            frame = check.frame(paths.find(name), annotated_size(content, where, check.add))
        except OutsideError as error:
            check.add(OUTSIDE, f"{where}: {error}")
            continue
        try:
            entries, caption = line_entries(content)
            if caption is not None and not captions:
                raise ValueError(MIXED)
        except ValueError as error:
            check.broken("mixed lines" if str(error) == MIXED else "broken entries", where, error)
            continue
        if not entries:
            check.add("images without boxes", shorten(name))
        before = check.num_boxes
        boxes: list[tuple[Box, str]] = []
        for entry in entries:
            boxes += _check_entry(check, entry, names, caption, frame, where)
        check.boxes_of_image(boxes, Path(name))
        present = [label for _, label in boxes]
        line_absent_names(content, names, present, caption, where, check.add, classes)
        check.count(check.num_boxes - before, where)
    for example in check.unknown:
        check.add("unknown classes" if len(check.unknown) > FEW * check.num_images else "few unknown classes", example)
    if check.seen.is_normalized:
        check.add("normalized boxes", f"{check.num_boxes} boxes")
    if check.num_images and len(check.broken_lines) == check.num_images:
        check.add("no usable entries", f"{check.num_images} lines")


def _check_entry(
    check: _Check,
    entry: Mapping[str, Any],
    names: Mapping[int, str],
    caption: str | None,
    frame: Frame,
    where: str,
) -> list[tuple[Box, str]]:
    """Check an instance or region, and return its boxes as annotated with its name, if it has one."""
    label = None
    try:
        label, _ = entry_name(entry, names, caption)
    except UnknownLabelError as error:
        check.broken_lines.add(where)
        check.unknown.append(f"{where}: {error}")
    except ValueError as error:
        check.broken("broken entries" if caption is None else "broken phrases", where, error)
    try:
        boxes = entry_boxes(entry)
    except ValueError as error:
        check.add("broken boxes", f"{where}: {error}")
        return []
    for box in boxes:
        check.num_boxes += 1
        check.seen.add(box)
        if label is not None:
            check.boxes_per_name[label] += 1
        report_box(frame.box(box), frame.width, frame.height, where, check.add)
    return [] if label is None else [(box, label) for box in boxes]
