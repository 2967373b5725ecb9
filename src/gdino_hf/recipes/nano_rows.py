"""Rows of both sets for `gdino_hf.recipes.nano_mixed`, with what the teacher and the classifier see in them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.coco import category_names, read_coco
from ..model.csp_pan import CspPanBackbone
from .closed_set_teacher import ClosedSetHead
from .mixed_data import LOOK_CONSTANTS, MixedRows, WithoutNames, look, look_once, weights_digest
from .nano import teacher_of
from .region_names import CONSTANTS, RegionNames, RowsWithRegions, common_labels, look_at_regions, read_namer
from .wordings import Wordings


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
    wordings = Wordings([*names, *category_names(Path(args.wild) / "train.json")])
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
    )
    if namer is not None:
        classifier, class_names = namer
        detector = teacher.of_classes([names.index(name) for name in found.asked])
        sets = list(everyday["names"]), list(wild["names"])
        looked = look_once(
            Path(args.output) / "regions.json",
            [
                *(*sets, image_processor.size, found.asked, class_names, CONSTANTS),
                weights_digest(backbone, detector, classifier),
            ],
            len(rows),
            lambda first: look_at_regions(rows, backbone, detector, image_processor, classifier, class_names, first),
        )
        _add_regions(found, looked, class_names)
    return found


def _add_regions(found: NanoRows, looked: list[dict[str, Any]], class_names: list[tuple[str, ...]]) -> None:
    """Add named regions to rows; their common labels count among the names that tell how rare a row is."""
    # Rare names are counted in each set.
    parts = looked[: found.num_everyday], looked[found.num_everyday :]
    common = [labels for part in parts for labels in common_labels(part, class_names)]
    every = {label for labels in common for label in labels}
    found.rows = RowsWithRegions(found.rows, looked)
    found.transforms.append(RegionNames(class_names, found.wordings, found.asked, every))
    for names, labels in zip(found.weighing, common, strict=True):
        names += [f"region {label}" for label in labels]
