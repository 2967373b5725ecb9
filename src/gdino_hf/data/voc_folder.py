"""Pascal VOC data sets: an XML document for each picture, in the devkit's folders or beside the pictures.

supervision's `DetectionDataset.from_pascal_voc` is not used: it stops at a document that it cannot read, opens every
picture to learn its size, knows no lists of pictures, and drops what is marked difficult or truncated unsaid.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from xml.etree.ElementTree import Element

from ..error_text import reason
from ..model.printable import printable
from ..model.text_prompt import shorten
from .annotation_options import AnnotationOptions
from .coco_content import is_marked
from .faults import OUTSIDE, Findings, Report
from .picture_index import PictureIndex
from .picture_sets import Mark, PictureEntry, PictureSet, files_below, files_of, relative_name
from .places import SPLIT_NAMES
from .rows import is_file
from .voc_document import VOC_OFFSET, parse_xml, voc_objects

_DOCUMENTS, _LISTS, _PICTURES = "Annotations", "ImageSets/Main", "JPEGImages"


class VocFolder(PictureSet):
    """A Pascal VOC data set; `base` is the folder with Annotations/, or one of documents beside their pictures."""

    form = "voc"
    title = "a Pascal VOC folder"

    @classmethod
    def splits(cls, base: str) -> dict[str, str]:
        return {
            split: name
            for split, names in SPLIT_NAMES.items()
            for name in reversed(names)
            if is_file(Path(base, _LISTS, f"{name}.txt"))
        }

    @classmethod
    def has_split(cls, base: str, split: str) -> bool:
        return is_file(Path(base, _LISTS, f"{split}.txt"))

    @cached_property
    def folder(self) -> Path:
        """Folder of the data set."""
        return Path(self.base)

    @cached_property
    def _documents(self) -> Path:
        inside = self.folder / _DOCUMENTS
        return inside if inside.is_dir() else self.folder

    @cached_property
    def index(self) -> PictureIndex:
        """The pictures that documents can mean."""
        folders = [self.folder / _PICTURES, self.folder / "images", self._documents, self.folder]
        return PictureIndex(folders if self.images is None else [self.images], self.folder, self.options)

    def keys(self) -> Sequence[Path]:
        return self._keys

    @cached_property
    def _keys(self) -> list[Path]:
        if self.split is None:
            if self._documents == self.folder and (beside := files_of(self.folder, ".xml")):
                return beside
            return files_below(self._documents, ".xml")
        file = self.folder / _LISTS / f"{self.split}.txt"
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise ValueError(f"{printable(file)} cannot be read as a list of pictures ({reason(error)}).") from error
        return [self._documents / f"{self._listed(line)}.xml" for line in map(str.strip, lines) if line]

    def _listed(self, line: str) -> str:
        """Return the name on a line of a list; lists of one class have 1, 0 or -1 after it."""
        name, _, mark = line.rpartition(" ")
        return name.rstrip() if name and mark in ("1", "0", "-1") else line

    def entry(self, key: Path, report: Report) -> PictureEntry | None:
        where = relative_name(key, self.base)
        if where.startswith("..") and self.options.paths != "anywhere":
            report(OUTSIDE, f"its path {shorten(where)} leads outside the data set's folder")
            return None
        root = parse_xml(key.read_bytes(), "annotation")
        picture = self.index.find(root.findtext("filename"), key, report, where)
        if picture is None:
            return None
        marks = voc_marks(root, where, self.options, report)
        return PictureEntry(relative_name(picture, self.base), picture, marks, voc_size(root))

    def finish(self, findings: Findings) -> None:
        if self.split is None:
            self.index.report_unused(self.base, findings)


def voc_size(root: Element) -> tuple[str, str] | None:
    """Return the width and height of a document's picture as written; None without them."""
    width, height = root.findtext("size/width", "").strip(), root.findtext("size/height", "").strip()
    # Some tools write 0 where they did not open the picture.
    return None if width in ("", "0") or height in ("", "0") else (width, height)


def voc_marks(root: Element, where: str, options: AnnotationOptions, report: Report) -> list[Mark]:
    """Return the objects of a document as x1, y1, x2, y2 in pixels from 0.

    Args:
        root: The document's root.
        where: The document, for messages.
        options: Conventions, which say what the first pixel's number is.
        report: Function that faults of single objects are passed to.
    """
    from_one = options.first_pixel == "1"
    marks = []
    for number, item in enumerate(voc_objects(root), 1):
        place = f"{where} object {number}"
        try:
            sides = item.sides()
        except ValueError as error:
            report("broken boxes", f"{place}: {reason(error)}")
            continue
        if from_one and min(sides[:2]) < 1:
            report("pixels from zero", f"{place}: {', '.join(f'{side:g}' for side in sides)}")
        box = [side - less for side, less in zip(sides, VOC_OFFSET, strict=True)] if from_one else sides
        difficult = is_marked(item.flag("difficult"))[0]
        if difficult and options.crowds == "ignore":
            report("difficult boxes", place)
        marks.append(Mark(item.name, box, place, crowd=int(difficult)))
    return marks


def voc_root(folder: Path) -> Path | None:
    """Return the folder with a VOC data set's Annotations/: the folder, or the one year of a devkit; None without one.

    Raises:
        ValueError: A devkit has several years.
    """
    if any(files_of(folder / _DOCUMENTS, ".xml")) or _has_documents_below(folder / _DOCUMENTS):
        return folder
    if not folder.is_dir():
        return None
    years = [place for place in sorted(folder.glob("VOC*")) if place.is_dir()]
    years = [place for place in years if (place / _DOCUMENTS).is_dir()]
    if not years and (folder / "VOCdevkit").is_dir():
        return voc_root(folder / "VOCdevkit")
    if len(years) > 1:
        names = ", ".join(str(PurePosixPath(place.name)) for place in years)
        raise ValueError(f"{printable(folder)} holds several data sets ({printable(names)}); give the path of one.")
    return years[0] if years else None


def _has_documents_below(folder: Path) -> bool:
    return folder.is_dir() and any(files_of(place, ".xml") for place in folder.iterdir() if place.is_dir())
