"""Rows of both sets for `gdino_hf.recipes.nano_mixed`, with what the teacher and the classifier see in them."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.coco import category_names, read_coco
from ..inference.optimize import optimize_for_inference
from ..model.csp_pan import CspPanBackbone
from ..model.processing_gdino import GDinoProcessor
from .closed_set_teacher import ClosedSetHead
from .efficientnet_lite import EfficientNetLite
from .imagenet_labels import classes_of
from .mixed_data import LOOK_CONSTANTS, MixedRows, WithoutNames, look, look_once, weights_digest
from .nano import teacher_of
from .nano_rating import load_checkpoint, processor_folder
from .region_names import (
    CONSTANTS,
    DRAWN_MORE,
    PROBABLE,
    RegionNames,
    RowsWithRegions,
    asker,
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
        factors: How much more often than that tells each row is drawn.
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
        ValueError: The teacher has another number of classes than everyday photographs have names, or a file that the
            options name is of another kind.
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
    namer = None if args.region_classifier is None else read_namer(args.region_classifier, args.region_class_names)
    seen = look_once(
        Path(args.output) / "teacher_on_wild.json",
        [list(wild["names"]), image_processor.size, LOOK_CONSTANTS, weights_digest(backbone, teacher)],
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
    if namer is not None:
        _add_regions(found, args, names_to_find(args.without, annotated, wordings), *namer)
    return found


def _add_regions(
    found: NanoRows,
    args: argparse.Namespace,
    names: Sequence[str],
    classifier: EfficientNetLite,
    class_names: Sequence[Sequence[str]],
) -> None:
    """Look for names in regions of all rows; probable regions make their photographs be drawn more often."""
    classes = {name: own for name in names if (own := classes_of(name, class_names))}
    unknown = [name for name in names if name not in classes]
    if unknown:
        logger.warning("No class of ImageNet is called %s; no region gets these names.", ", ".join(unknown))
    model = load_checkpoint(args.region_model)
    processor = GDinoProcessor.from_pretrained(processor_folder(args.region_model))
    rows, weights = found.rows, weights_digest(model, classifier, found.backbone, found.teacher)
    optimize_for_inference(model)
    looked = look_once(
        Path(args.output) / "regions.json",
        [found.weighing, processor.image_processor.size, classes, CONSTANTS, weights],
        len(rows),
        lambda first: look_at_regions(rows, asker(model, processor, list(classes)), classifier, classes, first),
    )
    regions = probable_regions(looked)
    found.rows = RowsWithRegions(rows, regions)
    found.transforms.append(RegionNames(list(classes), found.wordings))
    for place, row in enumerate(regions):
        probable = {name for name, chance, *_ in row["boxes"] if chance >= PROBABLE}
        found.weighing[place] += sorted(f"region {name}" for name in probable)
        found.factors[place] = DRAWN_MORE if probable else 1.0
