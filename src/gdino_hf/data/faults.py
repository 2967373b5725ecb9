"""Kinds of fault that annotation files have, and what readers do when they meet one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..model.printable import printable

logger = logging.getLogger(__name__)

UNREADABLE = "unreadable files"
"""Kind of fault of damaged images, which training can be told to skip."""

MISSING = "missing files"
"""Kind of fault of absent images, which training can be told to skip."""

OUTSIDE = "paths outside"
"""Kind of fault of images whose path leads outside the data set's folder."""

FEW = 0.01
"""Share of annotations up to which unknown classes or images are left out instead of stopping the reading."""

ERRORS = {
    "no usable entries": "none of the entries can be used",
    OUTSIDE: "lead outside the data set's folder and are not opened; --paths anywhere allows them in files from people "
    "you trust",
    MISSING: "not found in the image folder, which --images sets; --unreadable skip leaves them out",
    UNREADABLE: "not an image, or damaged; --unreadable skip leaves them out",
    "wrong sizes": "differ in size from their annotation, so boxes may not fit; correct width and height, or pass "
    "--sizes scale where the proportion is the same",
    "normalized boxes": "all boxes lie within 0..1 and are probably normalized; multiply them by the width and height "
    "of their picture",
    "corner boxes": "end outside of their picture as x, y, width, height but lie inside as x1, y1, x2, y2, which they "
    "probably are; write width and height",
    "unknown classes": "have no name in the file",
    "unknown images": "refer to an image that the file does not list",
    "repeated image ids": "used for several images",
    "repeated category ids": "used for several categories",
    "mixed lines": "have captions where the first line has none, or the reverse; keep the two in separate files",
    "broken names": "empty or not text",
    "only crowds": "every box is marked iscrowd, so nothing is left to train on or measure; pass --crowds keep if the "
    "marks are wrong",
    "no usable areas": "none of the areas is a number",
    "no usable boxes": "none of the annotations has a box that can be used",
}
WARNINGS = {
    "broken entries": "cannot be used and are left out",
    "broken phrases": "have no clear position in the caption, and their line is left out",
    "broken sizes": "have an unusable width or height, and that of the picture is taken",
    "broken areas": "have an unusable area, and that of the box is taken",
    "repeated entries": "are listed several times alike, and taken once",
    "few unknown classes": "have no name in the file, and their boxes are left out",
    "few unknown images": "refer to an image that the file does not list, and are left out",
    "broken boxes": "neither four finite numbers nor taken from a segment, and left out",
    "boxes turned": "have boxes in pixels of the stored picture, which were turned upright with it",
    "boxes scaled": "have another size than their annotation, and their boxes were scaled to it",
    "unclear orientations": "have an EXIF orientation that width and height do not tell; boxes are taken as those of "
    "the upright picture, and --boxes-follow stored says otherwise",
    "boxes outside": "extend beyond their image and are clipped to it, or dropped if nothing remains",
    "boxes without area": "dropped",
    "more boxes than queries": "have more boxes than a model of that many queries can find",
    "images of crowds": "have only boxes marked iscrowd, which teach nothing; --crowds keep takes them as boxes",
    "classes of crowds": "have only boxes marked iscrowd, which teach nothing; --crowds keep takes them as boxes",
    "trusted sizes": "are not there, so their boxes are taken as annotated, without regard to EXIF orientations; "
    "--images FOLDER says where they are",
    "grouping classes": "have no box and only group other classes, and are left out; --groups keep keeps them",
    "empty classes": "have no box",
    "alike names": "differ only in case or blanks and are one name to the model",
    "unknown names": "have no word that the tokenizer knows, so the model cannot learn or find them; rename them",
    "half-known names": "have words that the tokenizer does not know, of which the model reads only the rest; rename "
    "them",
    "names of equal tokens": "are one name to the model, because the tokenizer cannot tell them apart; rename them",
    "repeated names": "used for several categories and are one name to the model",
    "names with marks": "contain a period or question mark, which is read as a blank",
    "repeated files": "listed as several images",
    "repeated photographs": "are the same picture under two names",
    "shared photographs": "are in another split too, so that metrics on it are too good",
    "repeated annotation ids": "are used for several annotations, of which some tools read only the last",
    "repeated boxes": "are marked several times with the same name",
    "images without boxes": "provide negatives only",
}
# Faults that change what is read, which readers therefore log.
_SPOKEN = (
    "broken entries",
    "broken sizes",
    "trusted sizes",
    "few unknown classes",
    "broken boxes",
    "boxes outside",
    "boxes without area",
    "boxes turned",
    "boxes scaled",
    "unclear orientations",
    "images of crowds",
    "classes of crowds",
    "grouping classes",
)

Report = Callable[[str, str], None]
"""Function that is told the kind of a fault and where it is."""


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
        return f"{self.count} {self.kind}: {(ERRORS | WARNINGS)[self.kind]} ({examples})"


class Findings:
    """Counts faults by kind.

    Args:
        max_examples: Maximum number of examples kept for each kind.
    """

    def __init__(self, max_examples: int = 3) -> None:
        self.max_examples = max_examples
        self.by_kind: dict[str, Finding] = {}

    def add(self, kind: str, example: str) -> None:
        """Count one fault."""
        finding = self.by_kind.setdefault(kind, Finding(kind, kind in ERRORS))
        finding.count += 1
        if len(finding.examples) < self.max_examples:
            finding.examples.append(printable(example))

    def in_order(self) -> list[Finding]:
        """Return the findings, errors first."""
        order = [*ERRORS, *WARNINGS]
        return sorted(self.by_kind.values(), key=lambda finding: order.index(finding.kind))


class FaultError(ValueError):
    """An annotation file has a fault that stops the reading.

    Attributes:
        kind: Kind of the fault.
        example: Where it is.
    """

    def __init__(self, path: str | Path, kind: str, example: str) -> None:
        example = printable(example)
        super().__init__(f"{printable(path)} cannot be used: {kind}, {example} ({ERRORS[kind]}); repair it.")
        self.kind, self.example = kind, example

    def __reduce__(self) -> tuple[type[ValueError], tuple[str]]:
        # Worker processes of a data loader pass exceptions on; the message is what counts there.
        return ValueError, (str(self),)


class StrictFindings(Findings):
    """Raises an exception at the first error, and logs warnings that change what is read.

    Args:
        path: The annotation file, for messages.
        skip: Kinds of error that are only counted.
    """

    def __init__(self, path: str | Path, skip: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.path = path
        self.skip = skip

    def add(self, kind: str, example: str) -> None:
        """Count one fault.

        Raises:
            FaultError: The fault is an error that is not skipped.
        """
        if kind in ERRORS and kind not in self.skip:
            raise FaultError(self.path, kind, example)
        super().add(kind, example)

    def log(self) -> None:
        """Log one line for each kind of fault that changed what was read."""
        for finding in self.in_order():
            if finding.is_error or finding.kind in _SPOKEN:
                logger.warning("%s: %s", printable(self.path), finding)
