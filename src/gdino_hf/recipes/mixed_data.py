"""Everyday and wild photographs as one training set, with a closed-set teacher's boxes added to the wild ones.

Everyday photographs are annotated for all of their set's names. Wild ones are annotated for a few, and many of them do
not say what is absent. The teacher tells both about its own names: what it is sure to see becomes a box, and what it
is sure not to see becomes an absent name, so that prompts of wild photographs have negatives too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.repeat_factors import repeat_factors
from ..model.box_ops import batched_nms, box_iou, cxcywh_to_xyxy
from ..whole_files import write_whole_text
from .teacher_boxes import SAME_OBJECT_IOU
from .wordings import Wordings

# Scores from which the teacher's boxes are taken as annotations, and up to which a name counts as absent.
SURE = 0.5
ABSENT = 0.05
# A teacher's box that overlaps an annotated one more than this is taken for the same object under another name.
SAME_BOX_IOU = 0.5
BATCH_SIZE = 8
# What the result of `look` depends on, beside its arguments.
LOOK_CONSTANTS = (SURE, SAME_OBJECT_IOU)
# What was found is written after every so many photographs, a multiple of BATCH_SIZE.
WRITE_EVERY = 104
# Every so many-th everyday photograph is kept back from training, to fit the scores on.
HOLD_OUT = 20


def held_out(count: int, every: int) -> range:
    """Return the indices of the photographs that are kept back.

    Args:
        count: Number of photographs.
        every: Every so many-th is kept back, from the first; 0 keeps none back.
    """
    return range(0, count, every) if every else range(0)


@torch.no_grad()
def look(rows: Any, backbone: Any, teacher: Any, image_processor: Any, first: int = 0) -> Iterator[dict[str, Any]]:
    """Ask the teacher about photographs.

    Args:
        rows: Rows with "image" (PIL).
        backbone: The image backbone that the teacher reads.
        teacher: A `ClosedSetHead`.
        image_processor: Image processor with a fixed size.
        first: Index of the first row to look at.

    Yields:
        For each row "best", the highest score of each class, and "boxes", a list of [class, score, x1, y1, x2, y2] in
        [0, 1] of the boxes that score at least `SURE`.
    """
    for start in range(first, len(rows), BATCH_SIZE):
        images = [rows[index]["image"].convert("RGB") for index in range(start, min(start + BATCH_SIZE, len(rows)))]
        pixels = image_processor(images=images, return_tensors="pt")["pixel_values"]
        for scores, boxes in zip(*teacher(backbone(pixels).feature_maps), strict=True):
            cell, label = (scores >= SURE).nonzero(as_tuple=True)
            corners, found = cxcywh_to_xyxy(boxes[cell]), scores[cell, label]
            chosen = batched_nms(corners, found, label, SAME_OBJECT_IOU).tolist()
            entries = [[int(label[i]), *(round(x, 4) for x in (float(found[i]), *corners[i].tolist()))] for i in chosen]
            yield {"best": [round(x, 4) for x in scores.amax(dim=0).tolist()], "boxes": entries}


def look_once(
    path: Path, subject: Any, count: int, look_from: Callable[[int], Iterable[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Return what was found in photographs, and keep it in a file for the next run.

    An interrupted run resumes after the last multiple of `WRITE_EVERY` photographs.

    Args:
        path: The json file.
        subject: All that the result depends on, with a `repr` that tells it.
        count: Number of photographs.
        look_from: Called if the file lacks photographs, with the index of the first of them; returns an entry for that
            and every later one.

    Raises:
        ValueError: The file is about other photographs or was made with other settings, or entries are missing.
    """
    key = hashlib.sha256(repr(subject).encode()).hexdigest()
    kept: Any = {"subject": key, "found": []}
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(kept, dict) or kept.get("subject") != key:
        raise ValueError(f"{path} is about other photographs or was made with other settings; delete it.")
    found: list[dict[str, Any]] = kept["found"]
    if len(found) < count:
        for entry in look_from(len(found)):
            found.append(entry)
            if len(found) % WRITE_EVERY == 0 or len(found) == count:
                write_whole_text(path, json.dumps(kept))
    if len(found) != count:
        raise ValueError(f"{path} has {len(found)} photographs, but {count} are to be looked at; delete it.")
    return found


def weights_digest(*modules: torch.nn.Module) -> str:
    """Return a hash of all parameters and buffers of modules, which tells whether they are the same."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def words_of(names: Iterable[str]) -> set[str]:
    """Return the words of names, in lower case."""
    return {word for name in names for word in name.lower().replace("-", " ").split()}


def taught_row(row: dict[str, Any], seen: dict[str, Any], classes: Sequence[str], wordings: Wordings) -> dict[str, Any]:
    """Add the teacher's boxes and absent names to a row.

    Args:
        row: Row with "boxes" ((N, 4) xyxy in pixels), "names", "neg_names", "width" and "height".
        seen: The row's entry from `look`.
        classes: Names of the teacher's classes.
        wordings: The vocabulary's wordings.

    Returns:
        The row with more boxes and names. A name whose meaning is annotated already gets no further boxes, nor does a
        box that overlaps an annotated one. A name that shares a word with an annotated one is never absent ("apple",
        where there is a "fresh apple").
    """
    size = np.array([row["width"], row["height"]] * 2, dtype=np.float64)
    own = np.asarray(row["boxes"], dtype=np.float64).reshape(-1, 4)
    meanings = {wordings.meaning(name) for name in row["names"]}
    words = words_of((*row["names"], *meanings))
    boxes, names = [], []
    for label, _, *corners in seen["boxes"]:
        name, box = classes[label], np.array(corners) * size
        overlap = box_iou(torch.from_numpy(own), torch.from_numpy(box[None])).max().item() if len(own) else 0.0
        if wordings.meaning(name) not in meanings and overlap <= SAME_BOX_IOU:
            boxes.append(box)
            names.append(name)
    absent = [
        name
        for name, best in zip(classes, seen["best"], strict=True)
        if best <= ABSENT and wordings.meaning(name) not in meanings and not words & words_of((name,))
    ]
    known = [name for name in row.get("neg_names") or () if wordings.meaning(name) not in {*meanings, *names}]
    return {
        **row,
        "boxes": np.concatenate((own, np.array(boxes).reshape(-1, 4))),
        "names": [*row["names"], *names],
        "crowd": [*row["crowd"], *(False for _ in names)],
        "neg_names": list(dict.fromkeys((*known, *absent))),
    }


class WithoutNames:
    """Rows without the boxes of some names, which are never asked for either, as if nobody had annotated them.

    Args:
        rows: Rows with "boxes", "names", "crowd" and "neg_names".
        names: The names to leave out; so is everything that means the same.
        wordings: Wordings of the vocabulary.
    """

    def __init__(self, rows: Any, names: Sequence[str], wordings: Wordings) -> None:
        self.rows, self.wordings = rows, wordings
        self.left_out = {wordings.meaning(name) for name in names}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row without the names."""
        row = dict(self.rows[index])
        kept = [place for place, name in enumerate(row["names"]) if self._stays(name)]
        return {
            **row,
            "boxes": np.asarray(row["boxes"], dtype=np.float64).reshape(-1, 4)[kept],
            "names": [row["names"][place] for place in kept],
            "crowd": [row["crowd"][place] for place in kept],
            "neg_names": [name for name in row["neg_names"] or () if self._stays(name)],
        }

    def _stays(self, name: str) -> bool:
        return self.wordings.meaning(name) not in self.left_out


class MixedRows:
    """Rows of both sets, everyday ones first; every row has "neg_names".

    Args:
        everyday: Rows annotated for all of `names`.
        wild: Rows annotated for some names.
        seen: What the teacher sees in the wild rows, from `look`.
        names: Names of the everyday rows, which are the teacher's classes.
        wordings: Wordings of the names of both sets.
    """

    def __init__(
        self, everyday: Any, wild: Any, seen: Sequence[dict[str, Any]], names: Sequence[str], wordings: Wordings
    ) -> None:
        self.everyday, self.wild, self.seen = everyday, wild, seen
        self.names, self.wordings = list(names), wordings

    def __len__(self) -> int:
        return len(self.everyday) + len(self.wild)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row of either set."""
        if index >= len(self.everyday):
            place = index - len(self.everyday)
            return taught_row(dict(self.wild[place]), self.seen[place], self.names, self.wordings)
        row = dict(self.everyday[index])
        present = set(row["names"])
        return {**row, "neg_names": [name for name in self.names if name not in present]}


def mixed_weights(
    everyday: Sequence[Sequence[str]],
    wild: Sequence[Sequence[str]],
    wild_share: float,
    rare: float,
    hold_out: int = 0,
    factors: Sequence[float] | None = None,
) -> list[float]:
    """Compute how often to draw each row of both sets.

    Args:
        everyday: Names of the boxes of each everyday row.
        wild: Names of the boxes of each wild row.
        wild_share: Share of the wild rows among all that are drawn, 0..1.
        rare: Names on a smaller share of their set's images are drawn more often, see `repeat_factors`.
        hold_out: Every so many-th everyday row is never drawn, see `held_out`.
        factors: How many times as often as its names tell each row is drawn; None for once.

    Returns:
        One weight per row, everyday ones first; they add up to the number of rows.

    Raises:
        ValueError: The share is not in 0..1.
    """
    if not 0 <= wild_share <= 1:
        raise ValueError(f"The share of wild photographs must be in 0..1, got {wild_share}.")
    total = len(everyday) + len(wild)
    more = [1.0] * total if factors is None else list(factors)
    weights: list[float] = []
    for names, share, own in (
        (everyday, 1 - wild_share, more[: len(everyday)]),
        (wild, wild_share, more[len(everyday) :]),
    ):
        drawn = [rarity * factor for rarity, factor in zip(repeat_factors(names, rare), own, strict=True)]
        if names is everyday:
            for index in held_out(len(names), hold_out):
                drawn[index] = 0.0
        weights += [factor / sum(drawn) * share * total for factor in drawn]
    return weights
