"""Rows of both sets for `gdino_hf.recipes.nano_mixed`, with what the teacher and the classifier see in them."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.coco import category_names, read_coco
from ..inference.optimize import optimize_for_inference
from ..model.csp_pan import CspPanBackbone
from ..model.modeling_gdino import GDinoForObjectDetection
from ..model.processing_gdino import GDinoProcessor
from .closed_set_teacher import ClosedSetHead
from .efficientnet_lite import EfficientNetLite
from .imagenet_labels import classes_of
from .mixed_data import LOOK_CONSTANTS, MixedRows, WithoutNames, look, look_once, weights_digest
from .nano import teacher_of
from .nano_rating import told_model
from .region_names import (
    COMMON,
    CONSTANTS,
    DRAWN_MORE,
    PROBABLE,
    RegionNames,
    RowsWithRegions,
    asker,
    implied_names,
    look_at_regions,
    names_to_find,
    probable_regions,
    read_namer,
)
from .wordings import Wordings

logger = logging.getLogger(__name__)


@dataclass
class NanoRows:
    """The rows and what was read to make them.

    Attributes:
        rows: Everyday rows, then wild ones.
        num_everyday: Number of everyday rows.
        names: Names of the teacher's classes, those of the everyday set.
        asked: Those of them that are not left out.
        wordings: Wordings of the names of both sets.
        teacher: The closed-set teacher.
        backbone: The image backbone that it reads.
        weighing: For each row the names that tell how rare it is.
        factors: How many times as often as that tells each row is drawn.
        transforms: Transforms that must come before the augmentation.
    """

    rows: Any
    num_everyday: int
    names: list[str]
    asked: list[str]
    wordings: Wordings
    teacher: ClosedSetHead
    backbone: CspPanBackbone
    weighing: list[list[str]]
    factors: list[float]
    transforms: list[Any] = field(default_factory=list)


def read_rows(args: argparse.Namespace, image_processor: Any) -> NanoRows:
    """Read both sets, and look at their photographs if no earlier run with the same output folder has.

    Args:
        args: The command line's options.
        image_processor: The image processor of the model.

    Raises:
        ValueError: The teacher has another number of classes than everyday photographs have names, a file that the
            options name is of another kind, or the names to find in regions have no class or are too many.
    """
    everyday, wild = (read_coco(Path(folder) / "train.json") for folder in (args.everyday, args.wild))
    names = category_names(Path(args.everyday) / "train.json")
    teacher = teacher_of(args.backbone, names)
    annotated = [*names, *category_names(Path(args.wild) / "train.json")]
    wordings = Wordings(annotated)
    backbone = CspPanBackbone.from_pretrained(args.backbone)
    backbone.requires_grad_(False).eval()
    left_out = {wordings.meaning(name) for name in args.without}
    # Read before the photographs are looked at, which takes long.
    finder = None if args.region_model is None else _read_finder(args, annotated, wordings)
    of_teacher = [image_processor.size, LOOK_CONSTANTS, weights_digest(backbone, teacher)]
    seen = look_once(
        Path(args.output) / "teacher_on_wild.json",
        [list(wild["names"]), *of_teacher],
        len(wild),
        lambda first: look(wild, backbone, teacher, image_processor, first),
    )
    rows: Any = MixedRows(everyday, wild, seen, names, wordings)
    if args.without:
        rows = WithoutNames(rows, args.without, wordings)
    found = NanoRows(
        rows=rows,
        num_everyday=len(everyday),
        names=names,
        asked=[name for name in names if wordings.meaning(name) not in left_out],
        wordings=wordings,
        teacher=teacher,
        backbone=backbone,
        weighing=[
            [name for name in of_row if wordings.meaning(name) not in left_out]
            for of_row in (*everyday["names"], *wild["names"])
        ],
        factors=[1.0] * (len(everyday) + len(wild)),
    )
    if finder is not None:
        _add_regions(found, finder, Path(args.output) / "regions.json", of_teacher)
    return found


@dataclass
class _Finder:
    """What finds names in regions.

    Attributes:
        classes: ImageNet's classes of each name.
        implied: See `implied_names`.
        model: The model that is asked for the names.
        processor: Its processor.
        ask: What `asker` returned for them.
        classifier: The classifier.
    """

    classes: dict[str, tuple[int, ...]]
    implied: dict[str, set[str]]
    model: GDinoForObjectDetection
    processor: GDinoProcessor
    ask: Callable[[Sequence[Any]], tuple[Tensor, Tensor]]
    classifier: EfficientNetLite


def _read_finder(args: argparse.Namespace, annotated: Sequence[str], wordings: Wordings) -> _Finder:
    """Read what finds names in regions, given the names that photographs are annotated with."""
    classifier, class_names = read_namer(args.region_classifier, args.region_class_names)
    names = names_to_find(args.without, annotated, wordings)
    classes = {name: own for name in names if (own := classes_of(name, class_names))}
    unknown = ", ".join(name for name in names if name not in classes)
    if not classes:
        raise ValueError(
            f"No class of ImageNet is called {unknown}; leave out other names, or train without --region-model."
        )
    if unknown:
        logger.warning("No class of ImageNet is called %s; no region gets these names.", unknown)
    model, processor = told_model(argparse.Namespace(model=args.region_model, processor=None))
    model.float()
    implied = implied_names([*annotated, *classes], classes, class_names, wordings)
    return _Finder(classes, implied, model, processor, asker(model, processor, list(classes)), classifier)


def _add_regions(found: NanoRows, finder: _Finder, path: Path, of_teacher: Sequence[Any]) -> None:
    """Look for names in regions of all rows, once; probable regions make their photographs be drawn more often.

    Args:
        found: The rows, changed in place.
        finder: What finds names.
        path: The file of what was found.
        of_teacher: What the teacher's boxes in the rows depend on.
    """
    rows, classes = found.rows, finder.classes

    def look_from(first: int) -> Iterator[dict[str, Any]]:
        optimize_for_inference(finder.model)
        return look_at_regions(rows, finder.ask, finder.classifier, classes, first)

    weights = weights_digest(finder.model, finder.classifier)
    subject = [found.weighing, finder.processor.image_processor.size, classes, CONSTANTS, weights, *of_teacher]
    regions = probable_regions(look_once(path, subject, len(rows), look_from))
    found.rows = RowsWithRegions(rows, regions)
    found.transforms.append(RegionNames(list(classes), finder.implied, found.wordings))
    probable = [{name for name, chance, *_ in row["boxes"] if chance >= PROBABLE} for row in regions]
    photographs = Counter(name for names in probable for name in names)
    for place, names in enumerate(probable):
        found.weighing[place] += sorted(f"region {name}" for name in names if photographs[name] >= COMMON)
        found.factors[place] = DRAWN_MORE if names else 1.0
