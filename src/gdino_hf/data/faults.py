"""Kinds of fault that annotation files have, and what readers do when they meet one."""

from __future__ import annotations

import logging
import re
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

THIN = "thin boxes"
"""Kind of fault of boxes that show nothing, as those of files with fractions in place of pixels."""

FEW = 0.01
"""Share of annotations up to which unknown classes or images are left out instead of stopping the reading."""

# In the sentences, # is the number of faults and [one|many] a choice by it.
ERRORS = {
    "no usable entries": "none of the entries can be used",
    OUTSIDE: "# path[|s] [leads|lead] outside the data set's folder and [is|are] not opened; --paths anywhere allows "
    "[it|them] in files from people you trust",
    MISSING: "# image[|s] [is|are] not in the image folder, which --images sets; --unreadable skip leaves [it|them] "
    "out",
    UNREADABLE: "# file[|s] [is not an image|are not images], or damaged; --unreadable skip leaves [it|them] out",
    "wrong sizes": "# image[|s] [differs|differ] in size from [its|their] annotation, so boxes may not fit; correct "
    "width and height, or pass --sizes scale if the proportion is the same",
    "normalized boxes": "all boxes lie within 0..1 and are probably normalized; multiply them by the width and height "
    "of their picture",
    "corner boxes": "boxes end outside of their picture as x, y, width, height but lie inside as x1, y1, x2, y2, which "
    "they probably are; write width and height",
    "unknown classes": "# annotation[|s] [has|have] a class that the file does not name",
    "unknown images": "# annotation[|s] [refers|refer] to an image that the file does not list",
    "repeated image ids": "# image[|s] [has|have] the id of another image",
    "repeated category ids": "# categor[y|ies] [has|have] the id of another category",
    "mixed lines": "# line[|s] [has a caption|have captions] where the first line has none; keep the two in separate "
    "files",
    "broken names": "# name[|s] [is|are] empty or not text",
    "only crowds": "every box is marked iscrowd or difficult, so nothing is left to train on or measure; pass "
    "--crowds keep if the marks are wrong",
    "no usable areas": "none of the areas is a number",
    "no annotations": "no picture has a JSON, XML or text file of its own name; add them",
    "no label files": "none of the pictures has a label file, which is looked for as labels/NAME.txt in place of "
    "images/NAME.jpg, and beside the picture; put them there",
    "pixels for fractions": "boxes have numbers far above 1, where fractions of the picture are expected; divide them "
    "by its width and height",
    "no usable boxes": "none of the annotations has a box that can be used",
}
WARNINGS = {
    "broken entries": "# entr[y|ies] cannot be used and [is|are] left out",
    "broken phrases": "# phrase[|s] [has|have] no clear position in the caption, and [its line is|their lines are] "
    "left out",
    "broken sizes": "# image[|s] [has|have] an unusable width or height, and that of the picture is taken",
    "broken areas": "# annotation[|s] [has|have] an unusable area, and that of the box is taken",
    "repeated entries": "# entr[y|ies] [is|are] listed again with equal content, and taken once",
    "few unknown classes": "# annotation[|s] [has|have] a class that the file does not name, and [is|are] left out",
    "few unknown images": "# annotation[|s] [refers|refer] to an image that the file does not list, and [is|are] left "
    "out",
    "broken boxes": "# box[|es] [is|are] neither four finite numbers nor taken from a segment, and left out",
    "boxes turned": "# image[|s] [has|have] boxes in pixels of the stored picture, which were turned upright with it",
    "boxes scaled": "# image[|s] [has|have] another size than [its|their] annotation, and boxes were scaled to it",
    "unclear orientations": "# image[|s] [has|have] an EXIF orientation that width and height do not tell; boxes are "
    "taken as those of the upright picture, and --boxes-follow stored says otherwise",
    "boxes outside": "# box[|es] [extends|extend] beyond [its|their] image and [is|are] clipped to it, or dropped if "
    "nothing remains",
    "fractions outside": "# box[|es] [has|have] numbers outside of 0..1, where fractions of the picture are expected, "
    "and [is|are] clipped to it",
    "pixels from zero": "# box[|es] [begins|begin] at pixel 0, though Pascal VOC counts from 1; --first-pixel 0 takes "
    "the numbers as they are",
    "difficult boxes": "# box[|es] [is|are] marked difficult and neither [teaches|teach] nor [counts|count]; --crowds "
    "keep takes [it|them] as [a box|boxes] like all others",
    "shapes without extent": "# shape[|s] [is a point or line|are points or lines], which [has|have] no box, and left "
    "out",
    "tasks without annotations": "# task[|s] [is|are] not annotated, or skipped, and left out",
    "labels without pictures": "# file[|s] of labels [has|have] no picture, and [is|are] left out",
    "pictures without annotations": "# picture[|s] [has|have] no annotation file, and [is|are] left out",
    "pictures alone in tars": "# picture[|s] [has|have] no JSON, XML or text file of [its|their] name in the tar, and "
    "[counts|count] as without objects",
    "boxes without area": "# box[|es] [has|have] no area and [is|are] dropped",
    THIN: "# box[|es] [is|are] narrower or lower than half a pixel inside [its|their] image, where nothing can be "
    "seen; correct or remove [it|them]",
    "more boxes than queries": "# image[|s] [has|have] more boxes than a model of that many queries can find",
    "images of crowds": "# image[|s] [has|have] only boxes marked iscrowd or difficult, which teach nothing; --crowds "
    "keep takes them as boxes",
    "classes of crowds": "# class[|es] [has|have] only boxes marked iscrowd or difficult, which teach nothing; "
    "--crowds keep takes them as boxes",
    "odd crowd marks": "# annotation[|s] [has|have] an iscrowd other than 0, 1, true and false; yes and no are "
    "understood, and anything else counts as 0",
    "trusted sizes": "# image[|s] [is|are] not there, so boxes are taken as annotated, without regard to EXIF "
    "orientations; --images FOLDER says where [it is|they are]",
    "grouping classes": "# class[|es] [has|have] no box and only [groups|group] other classes, and [is|are] left out; "
    "--groups keep keeps [it|them]",
    "empty classes": "# class[|es] [has|have] no box",
    "alike names": "# name[|s] [is|are] spelled in several ways that differ only in case or blanks, which are one name "
    "to the model",
    "unknown names": "# name[|s] [has|have] no word that the tokenizer knows, so the model cannot learn or find "
    "[it|them]; rename [it|them]",
    "half-known names": "# name[|s] [has|have] words that the tokenizer does not know, so the model reads only the "
    "rest; rename [it|them]",
    "names of equal tokens": "the tokenizer cannot tell apart the names of # group[|s], so each group is one name to "
    "the model; rename them",
    "repeated names": "# name[|s] [stands|stand] for several categories, which are one to the model",
    "names with marks": "# name[|s] [contains|contain] a period or question mark, which is read as a blank",
    "names with separators": "# name[|s] [contains|contain] a comma, period or line break, where typed label text is "
    "split into several labels; rename [it|them], or give [it|them] in a list, which keeps labels whole",
    "repeated files": "# file[|s] [is|are] listed as several images",
    "repeated photographs": "# photograph[|s] [is|are] there under two names",
    "shared photographs": "# photograph[|s] [is|are] in another split too, so that metrics on it are too good",
    "repeated annotation ids": "# id[|s] [is|are] used for several annotations, of which some tools read only the last",
    "repeated boxes": "# box[|es] [is|are] marked several times with the same name",
    "images without boxes": "# image[|s] [has|have] no box and [provides|provide] negatives only",
    "broken absent names": "# entr[y|ies] of absent names [is|are] neither a name nor a list of names, and left out",
    "unread absent names": "# image[|s] [has|have] a field that seems to hold absent names but is not read; call it "
    "neg_names",
    "contradicting absent names": "# name[|s] [is|are] listed as absent from an image that has a box of [it|them]; the "
    "box counts",
    "absent names without class": "# name[|s] [is|are] listed as absent, but [is no class|are no classes] of the file",
}
_CHOICE = re.compile(r"\[([^|\]]*)\|([^\]]*)\]")
# Faults that change what is read, which readers therefore log.
_SPOKEN = (
    "tasks without annotations",
    "broken entries",
    "broken sizes",
    "trusted sizes",
    "few unknown classes",
    "few unknown images",
    "broken boxes",
    "odd crowd marks",
    "broken absent names",
    "unread absent names",
    "boxes outside",
    "fractions outside",
    "pixels from zero",
    "difficult boxes",
    "shapes without extent",
    "labels without pictures",
    "pictures without annotations",
    "pictures alone in tars",
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


def sentence(kind: str, count: int = 1) -> str:
    """Return what a kind of fault means, without a period at the end.

    Args:
        kind: Name of the kind.
        count: Number of faults.
    """
    text = (ERRORS | WARNINGS)[kind].replace("#", str(count))
    return _CHOICE.sub(lambda match: match.group(1 if count == 1 else 2), text)


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun: "1 box", "2 boxes".

    Args:
        number: How many.
        one: The noun for one.
        many: The noun for all other numbers; by default the same with an s.
    """
    return f"{number} {one if number == 1 else many or one + 's'}"


def describe(kind: str, example: str) -> str:
    """Return the text for one fault, with its kind and where it is."""
    return f"{kind}, {example} ({sentence(kind)})"


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
        return f"{self.kind}: {sentence(self.kind, self.count)} ({examples})"


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
        super().__init__(f"{printable(path)} cannot be used: {describe(kind, example)}; repair it.")
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
