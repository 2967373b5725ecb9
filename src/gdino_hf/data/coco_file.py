"""A data set as training, evaluation and checks all read it: names, and images with boxes of the upright picture."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..error_text import reason
from ..model.text_prompt import name_key, shorten
from .absent_names import IDS, absent_names, check_absent_names, has_absent_names, report_unread
from .annotation_options import DEFAULT_OPTIONS, AnnotationOptions
from .coco_content import id_key, is_id, is_marked, read_id
from .content import PICTURE, WHERE, Content
from .faults import FEW, MISSING, OUTSIDE, UNREADABLE, Findings
from .frames import Box, Frame, Size, annotated_size, find_frame, read_header
from .image_paths import ImagePaths, OutsideError
from .reading import names_in_other_splits, read_content
from .rows import BoxRange, is_file, parse_box, parse_number, parse_text, report_box
from .segments import mask_size, segment_box
from .stored_pictures import Picture, StoredPicture

# Boxes outside of their picture that make it likely that all boxes are corners.
_FEWEST_OUTSIDE = 3
# Fractions of boxes at a picture's edge may be above 1 by rounding; larger ones than the second are pixels.
_FRACTION_ROUNDING, _CERTAINLY_PIXELS = 1e-3, 2.0


@dataclass
class CocoImage:
    """An image of a data set with its annotations.

    Attributes:
        id: Its id: an integer, or text if the file has text.
        path: Its file, which need not exist, or where it is stored.
        entry: Its entry in the file.
        size: Width and height of the upright picture in pixels; None if neither the file nor the annotations tell.
        boxes: Boxes as xyxy in pixels of the upright picture, neither clipped nor rounded.
        categories: Category of each box, as a key of `CocoFile.names`.
        crowd: Whether each box marks a crowd.
        areas: Area of each box's segment in square pixels as annotated, or else that of the box.
        absent: Names that are known not to be in the picture; None if these are all that have no box in it.
    """

    id: int | str
    path: Picture
    entry: Mapping[str, Any]
    size: tuple[int, int] | None
    boxes: list[Box] = field(default_factory=list)
    categories: list[int | str] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    absent: list[str] | None = None


class CocoFile:
    """A COCO file, or a data set of another form but ODVG, with its conventions resolved.

    Args:
        annotations: The COCO json file, or the place of the data set as `annotation_file` returns it.
        images: Folder of the images; found as `read_coco` finds it by default.
        options: The conventions to assume.
        findings: Receives the faults of categories at once, and those of images as `images` is iterated.
        content: What was read from it, or a part of that; None to read all.

    Attributes:
        names: Name of each category by its id, in ascending order; those left out as groups are not among them.
        labels: The distinct names, in the order of `names`. Spellings that differ in case or blanks are one name.
        label_of: Index in `labels` of each category id in `names`.
        label_places: Index in `labels` of each name, in the form of `name_key`.
        groups: The names left out because they only group others.
        has_text_ids: Whether some image ids are text that is no number.
        has_absent_names: Whether some images say which names are absent from them.
        is_lvis: Whether they do so by ids, as in LVIS.

    Raises:
        ValueError: It cannot be read, or is not a COCO detection file.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path | None,
        options: AnnotationOptions,
        findings: Findings,
        content: Content | None = None,
    ) -> None:
        self.annotations, self.options, self.findings = annotations, options or DEFAULT_OPTIONS, findings
        self.content = read_content(annotations, images, self.options, findings) if content is None else content
        self.paths = ImagePaths(annotations, images, self.options)
        self.ids: dict[int | str, Any] = {}
        self._all_names = self._read_names()
        groups = set() if self.options.groups == "keep" else self._find_groups()
        self.groups = [name for number, name in self._all_names.items() if number in groups]
        self.names = {number: name for number, name in self._all_names.items() if number not in groups}
        places = self.label_places = dict[str, int]()
        self.labels: list[str] = []
        for name in self.names.values():
            if name_key(name) not in places:
                places[name_key(name)] = len(self.labels)
                self.labels.append(name)
        self.label_of = {number: places[name_key(name)] for number, name in self.names.items()}
        self.has_absent_names = any(map(has_absent_names, self.content.images))
        self.is_lvis = any(IDS in image for image in self.content.images)
        self.has_text_ids = any(isinstance(image.get("id"), str) for image in self.content.images)
        if not self.content.is_relative and _is_normalized(self.content):
            findings.add("normalized boxes", f"{len(self._annotations())} boxes")
        self._find_unknown()

    def _read_names(self) -> dict[int | str, str]:
        names: dict[int | str, str] = {}
        keys: set[str] = set()
        for category in self.content.categories:
            where = f"category {shorten(category.get('id'))}"
            try:
                number = read_id(category.get("id"))
            except ValueError as error:
                self.findings.add("broken entries", f"{where}: {error}")
                continue
            try:
                name = parse_text(category.get("name"), "its name")
            except ValueError as error:
                self.findings.add("broken names", f"{where}: {error}")
                name = ""
            if number in names:
                self.findings.add("repeated entries" if names[number] == name else "repeated category ids", where)
                continue
            if name and name in keys:
                self.findings.add("repeated names", shorten(name))
            keys.add(name)
            names[number] = name
            self.ids[number] = category["id"]
        return dict(sorted(names.items(), key=lambda item: (isinstance(item[0], str), item[0])))

    def _find_groups(self) -> set[int | str]:
        """Return the categories without boxes that are only the supercategory of others, such as exports add."""
        used = {name_key(self._all_names.get(id_key(item.get("category_id")), "")) for item in self._annotations()}
        parents = {
            name_key(category["supercategory"])
            for category in self.content.categories
            if isinstance(category.get("supercategory"), str)
            and name_key(category["supercategory"]) != name_key(str(category.get("name")))
        }
        # A file without boxes shows nothing about its classes.
        if not any(used):
            return set()
        unused = {number: name for number, name in self._all_names.items() if name and name_key(name) not in used}
        groups = {number for number, name in unused.items() if name_key(name) in parents}
        if groups:
            # A class that has boxes in another split only is none that groups others.
            elsewhere = {name_key(name) for name in self.options.used}
            elsewhere |= names_in_other_splits(self.annotations)
            groups = {number for number in groups if name_key(self._all_names[number]) not in elsewhere}
        for number in groups:
            self.findings.add("grouping classes", shorten(self._all_names[number]))
        return groups

    def _find_unknown(self) -> None:
        """Report annotations whose category or image is not in the file; a few of thousands are left out."""
        categories: list[str] = []
        images: list[str] = []
        # An annotation without an image id does not belong to an image without an id.
        listed = {id_key(entry["id"]) for entry in self.content.images if is_id(entry.get("id"))}
        for annotation in self._annotations():
            category, image = annotation.get("category_id"), annotation.get("image_id")
            if id_key(category) not in self._all_names:
                unknown = f"category_id {shorten(category)} is not among the file's categories"
                categories.append(f"{_where(annotation)}: {unknown}")
            if id_key(image) not in listed:
                images.append(f"{_where(annotation)}: image_id {shorten(image)}")
        for kind, found in (("unknown classes", categories), ("unknown images", images)):
            few = len(found) <= FEW * len(self._annotations())
            for example in found:
                self.findings.add(f"few {kind}" if few else kind, example)

    def _annotations(self) -> list[dict[str, Any]]:
        return self.content.annotations

    def images(
        self, need_files: bool = True, keep_faulty: bool = False, check_damage: bool = True
    ) -> Iterator[CocoImage]:
        """Yield the images in file order with all boxes that can be used, and report the faults of the others.

        Args:
            need_files: Whether a missing or damaged image file is a fault, and the image left out; otherwise its boxes
                are taken as annotated.
            keep_faulty: Whether images with such a fault are yielded all the same.
            check_damage: Whether a damaged image file is such a fault; otherwise decoding the image reports it.
        """
        by_image: dict[int | str, list[dict[str, Any]]] = defaultdict(list)
        for annotation in self._annotations():
            by_image[id_key(annotation.get("image_id"))].append(annotation)
        listed: dict[int | str, Picture] = {}
        tally = _Tally()
        for place, entry in enumerate(self.content.images):
            try:
                number = read_id(entry.get("id"))
                path = (
                    entry[PICTURE]
                    if isinstance(entry.get(PICTURE), (Path, StoredPicture))
                    else self.paths.find_coco(entry)
                )
            except OutsideError as error:
                self.findings.add(OUTSIDE, f"image {place}: {error}")
                tally.skipped = True
                continue
            except ValueError as error:
                tally.broken_image = f"image {place}: {error}"
                self.findings.add("broken entries", tally.broken_image)
                continue
            if number in listed:
                is_same = listed[number] == path
                self.findings.add("repeated entries" if is_same else "repeated image ids", f"image {number}")
                if is_same:
                    continue
            listed[number] = path
            own = by_image.get(number, [])
            annotated = annotated_size(entry, shorten(path.name), self.findings.add)
            frame, is_usable = self._frame(path, annotated, mask_size(own), need_files, check_damage)
            if not is_usable and not keep_faulty:
                tally.skipped = True
                continue
            tally.images += 1
            image = CocoImage(number, path, entry, (frame.width, frame.height) if frame else None)
            self._add_boxes(image, own, frame or Frame(0, 0), tally)
            self._add_absent(image)
            yield image
        self._conclude(tally)

    def _frame(
        self, path: Picture, size: Size | None, masks: Size | None, need_files: bool, check_damage: bool
    ) -> tuple[Frame | None, bool]:
        """Return what an image's boxes are pixels of, if that is known, and whether its file can be used."""
        annotated = None if size is None else Frame(*size)
        needs_size = self.content.is_relative and size is None
        name = shorten(path.name)
        if is_file(path):
            try:
                stored, orientation = read_header(path)
            # A damaged file makes the decoders raise exceptions of almost any type.
            except Exception as error:
                if (need_files and check_damage) or needs_size:
                    self.findings.add(UNREADABLE, f"{name}: {reason(error)}")
                    return annotated, False
            else:
                # Without a size of the image, that of its masks tells which way up it was annotated.
                size = masks if size is None and masks in (stored, stored[::-1]) else size
                return find_frame(size, stored, orientation, self.options, name, self.findings.add), True
        elif need_files or needs_size:
            self.findings.add(MISSING, str(path))
            return annotated, False
        else:
            self.findings.add("trusted sizes", name)
        return annotated, True

    def _add_boxes(self, image: CocoImage, annotations: list[dict[str, Any]], frame: Frame, tally: _Tally) -> None:
        singles = 0
        for annotation in annotations:
            where = _where(annotation)
            category = id_key(annotation.get("category_id"))
            name = self._all_names.get(category)
            # Annotations of unknown categories were reported when the file was opened.
            if name is None:
                continue
            crowd = self.options.crowds == "ignore" and self._is_crowd(annotation, where)
            try:
                annotated = annotation_box(annotation, frame.annotated, self.content)
            except ValueError as error:
                tally.broken = f"{where}: {error}"
                self.findings.add("broken boxes", tally.broken)
                continue
            tally.boxes += 1
            tally.crowds += crowd
            # Names that have boxes of crowds alone are counted with 0.
            tally.used[name] += not crowd
            singles += not crowd
            try:
                area = _area(annotation, annotated)
            except ValueError as error:
                tally.broken_areas += 1
                tally.broken_area = f"{where}: {error}"
                self.findings.add("broken areas", tally.broken_area)
                area = box_area(annotated)
            if self.content.is_relative:
                self._check_fractions(annotation, where, tally)
            elif image.size is not None and not crowd and self.content.box_form == "xywh":
                tally.compare_corners(annotated, frame, annotation.get("bbox"))
            image.boxes.append(frame.box(annotated))
            if image.size is not None:
                report_box(image.boxes[-1], *image.size, where, self.findings.add)
            image.categories.append(category)
            image.crowd.append(crowd)
            image.areas.append(area * frame.scale[0] * frame.scale[1])
        if image.boxes and not singles:
            self.findings.add("images of crowds", shorten(image.path.name))

    def _check_fractions(self, annotation: Mapping[str, Any], where: str, tally: _Tally) -> None:
        """Report numbers outside of 0..1 where fractions of the picture are expected."""
        given = annotation.get("bbox") or [side for polygon in annotation.get("segmentation") or () for side in polygon]
        numbers = [float(parse_number(number)) for number in given]
        if numbers and not all(-_FRACTION_ROUNDING <= number <= 1 + _FRACTION_ROUNDING for number in numbers):
            self.findings.add("fractions outside", f"{where}: {', '.join(f'{number:g}' for number in numbers[:8])}")
            tally.pixels += max(numbers) > _CERTAINLY_PIXELS

    def _add_absent(self, image: CocoImage) -> None:
        where = shorten(image.path.name)
        report_unread(image.entry, where, self.findings.add)
        if not has_absent_names(image.entry):
            return
        absent = absent_names(image.entry, self.names, where, self.findings.add)
        groups = {name_key(name) for name in self.groups}
        absent = [name for name in absent if name_key(name) not in groups]
        present = [self.names[category] for category in image.categories]
        image.absent = check_absent_names(absent, present, self.label_places, where, self.findings.add)

    def _is_crowd(self, annotation: Mapping[str, Any], where: str) -> bool:
        given = annotation.get("iscrowd")
        is_set, is_usual = is_marked(given)
        if not is_usual:
            self.findings.add("odd crowd marks", f"{where}: {shorten(given)}")
        return is_set

    def _conclude(self, tally: _Tally) -> None:
        if tally.broken_image and not tally.images and not tally.skipped:
            self.findings.add("no usable entries", f"such as {tally.broken_image}")
        if tally.boxes and tally.boxes == tally.crowds:
            self.findings.add("only crowds", f"{tally.boxes} boxes")
        elif not tally.boxes and tally.broken and not tally.skipped:
            self.findings.add("no usable boxes", f"such as {tally.broken}")
        if tally.boxes and tally.broken_areas == tally.boxes:
            self.findings.add("no usable areas", f"such as {tally.broken_area}")
        if tally.boxes and tally.pixels * 2 > tally.boxes:
            self.findings.add("pixels for fractions", f"{tally.pixels} of {tally.boxes} boxes")
        if tally.as_corners and tally.outside >= max(_FEWEST_OUTSIDE, tally.boxes / 4):
            self.findings.add("corner boxes", f"{tally.outside} of {tally.boxes} boxes")
        for name, count in tally.used.items():
            if count == 0 and name and tally.boxes:
                self.findings.add("classes of crowds", shorten(name))


@dataclass
class _Tally:
    """What was read from a file: images, boxes, crowds among them, boxes by name, the last broken image and box."""

    images: int = 0
    boxes: int = 0
    crowds: int = 0
    used: Counter[str] = field(default_factory=Counter)
    broken: str = ""
    broken_image: str = ""
    broken_area: str = ""
    broken_areas: int = 0
    skipped: bool = False
    # Boxes that end outside of their picture, and whether all boxes would be inside of it if they were corners.
    outside: int = 0
    as_corners: bool = True
    # Boxes whose numbers are too large for fractions.
    pixels: int = 0

    def compare_corners(self, box: Box, frame: Frame, given: Any) -> None:
        """Compare a box with the picture both as x, y, width, height and as two corners."""
        if not given:
            return
        width, height = frame.annotated
        x1, y1, x2, y2 = box[0], box[1], box[2] - box[0], box[3] - box[1]
        self.outside += box[2] > width + 1 or box[3] > height + 1
        self.as_corners = self.as_corners and 0 <= x1 < x2 <= width + 1 and 0 <= y1 < y2 <= height + 1


def annotation_box(
    annotation: Mapping[str, Any], size: tuple[float, float] = (0, 0), content: Content | None = None
) -> Box:
    """Return the box of an annotation, from its segment if it has no box of its own.

    Args:
        annotation: Entry of the file's "annotations".
        size: Width and height of the image in annotated pixels; zeros if unknown.
        content: Content that the annotation is part of, which says what its numbers are; None for x, y, width and
            height in pixels.

    Returns:
        The box as annotated, xyxy in pixels.

    Raises:
        ValueError: There is neither a box nor a segment, the box is broken, or the mask is one of another size.
    """
    content = content or Content()
    form, is_relative = content.box_form, content.is_relative
    if is_relative and not all(size):
        raise ValueError("its numbers are fractions of a picture that cannot be read to tell its size")
    scale = size if is_relative else (1.0, 1.0)
    given = annotation.get("bbox")
    if given is not None and given != []:
        try:
            box = parse_box(given, form, scale)
        except ValueError:
            box = None
        if box is not None and box[2] > box[0] and box[3] > box[1]:
            return box
    # A box that is missing, has missing numbers or no area, as some tools write it.
    segment = annotation.get("segmentation")
    from_segment = segment_box(segment)
    if from_segment is not None and isinstance(segment, Mapping) and all(size):
        height, width = (int(side) for side in segment["size"])
        if (width, height) != tuple(map(round, size)):
            raise ValueError(f"its mask is of {width}x{height} pixels, but its image of {size[0]:g}x{size[1]:g}")
    if from_segment is None:
        return parse_box(given, form, scale)
    x1, y1, x2, y2 = from_segment
    return (x1 * scale[0], y1 * scale[1], x2 * scale[0], y2 * scale[1])


def box_area(box: Box) -> float:
    """Return the area of an xyxy box in square pixels."""
    return (box[2] - box[0]) * (box[3] - box[1])


def _area(annotation: Mapping[str, Any], box: Box) -> float:
    area = parse_number(annotation.get("area"))
    if area is None:
        return box_area(box)
    if not isinstance(area, (int, float)) or not math.isfinite(area):
        raise ValueError(f"the area {shorten(area)} is not a finite number")
    return float(area)


def _where(annotation: Mapping[str, Any]) -> str:
    where = annotation.get(WHERE)
    return where if isinstance(where, str) else f"annotation {shorten(annotation.get('id'))}"


def _is_normalized(content: Content) -> bool:
    seen = BoxRange()
    for annotation in content.annotations:
        try:
            seen.add(annotation_box(annotation, content=content))
        except ValueError:
            continue
        if not seen.is_within:
            return False
    return seen.is_normalized
