"""An exported folder in int8: layers stay in float until calibration pictures show the boxes of the float graphs.

All layers are int8 at first. If too few boxes stay in place, groups of neighbouring layers are measured alone, and the
groups with the worst results go back to float one after the other.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.folder_files import sort_files
from ..detection.exported_folder import ExportedFolder
from ..model.picture_pixels import load_image
from ..model.pixel_values import prepared
from ..model.text_prompt import PromptChunk
from ..runtime import Detector
from ..runtime.exported_search import ExportedGraphs
from .int8_weights import Layers, find_layers, write_int8

PIXELS = 2.0
"""Distance in pixels of the picture within which all sides of a box have to stay."""
AGREEMENT = 0.9
"""Share of the boxes on calibration pictures that have to stay in place."""
MOST_PICTURES = 16

_BOXES = 5  # of every picture, those with the highest scores
_SCORES = 0.1
_GROUPS = 8
_LABELS = [
    *("person", "cat", "dog", "cup", "bottle", "chair", "table", "car", "bicycle", "book"),
    *("phone", "laptop", "bag", "hat", "shoe", "tree", "bird", "ball", "clock", "spoon"),
]
_PACKAGE = Path(__file__).resolve().parents[1]
_EXAMPLES = (_PACKAGE / "_demo" / "examples", _PACKAGE.parents[1] / "demo" / "examples")


@dataclass(frozen=True)
class Agreement:
    """How the boxes of int8 graphs compare with those of float graphs.

    Attributes:
        share: Share of the boxes that stayed in place, with the same label and a score that differs by at most 0.1.
        boxes: Number of boxes compared.
        pixels: Median distance in pixels between the sides of a box, the largest of its four.
        score: Mean difference of the scores.
    """

    share: float
    boxes: int
    pixels: float
    score: float


def calibration_pictures(given: Any, tell: Callable[[str], Any]) -> list[Image.Image]:
    """Read the pictures to calibrate on.

    Args:
        given: Folder of pictures, or a list of pictures in any form; None for the three photographs of demo/examples,
            which an installed package has a copy of. Of more than 16, 16 at even distances are used.
        tell: Function that is called with a line for files that are left out.

    Raises:
        ValueError: There are none, or one cannot be read.
    """
    if given is None:
        given = [path for folder in _EXAMPLES for path in sorted(folder.glob("*.jpg"))]
        if not given:
            raise ValueError("The example photographs are not installed; give pictures of your own as calibration.")
    if isinstance(given, (str, os.PathLike)):
        files = sort_files(Path(given), None)
        line = files.left_out(Path(given))
        if line is not None:
            tell(line)
        found: Sequence[Any] = [path for path, why in files.pictures if why is None]
        if not found:
            raise ValueError(f"The folder {given} has no pictures to calibrate on; give another.")
    else:
        found = list(given)
        if not found:
            raise ValueError("The list of calibration pictures is empty; give at least one picture.")
    places = np.linspace(0, len(found) - 1, min(len(found), MOST_PICTURES)).round().astype(int)
    return [load_image(found[place]) for place in places]


def to_int8(
    folder: Path, content: Mapping[str, Any], pictures: Sequence[Image.Image], tell: Callable[[str], Any]
) -> tuple[dict[str, Any], list[Path]]:
    """Replace the graphs of a whole float folder by int8 ones.

    Args:
        folder: The folder, with its document.
        content: What the document holds.
        pictures: Calibration pictures.
        tell: Function that is called with a line of progress before each step.

    Returns:
        The entry "int8" of the document, and the files that were replaced.

    Raises:
        ValueError: Too few boxes stay in place although all groups of layers but one are in float.
    """
    sources = {
        role: folder / entry["name"] for role, entry in content["files"].items() if not role.endswith("_weights")
    }
    layers = {role: find_layers(path) for role, path in sources.items()}
    groups = _groups(layers)
    if not groups:
        raise ValueError("The graphs have no layer whose weights could be int8; export in float.")
    comparison = _Comparison(folder, pictures)
    with tempfile.TemporaryDirectory() as work:
        targets = {role: Path(work) / path.name for role, path in sources.items()}

        def measure(kept: Collection[tuple[str, str]]) -> Agreement:
            for role, source in sources.items():
                write_int8(source, targets[role], [name for of_role, name in kept if of_role == role])
            return comparison.measure(targets)

        tell(f"writing the weights in int8 and comparing boxes on {len(pictures)} pictures")
        kept: list[tuple[str, str]] = []
        found, alone = measure(kept), []
        if found.share < AGREEMENT:
            tell(f"{found.share:.2f} of the boxes stay in place; measuring {len(groups)} groups of layers")
            every = [layer for group in groups for layer in group]
            alone = [measure([layer for layer in every if layer not in group]) for group in groups]
            # Worst first; the last group has to stay.
            order = sorted(range(len(groups)), key=lambda place: (alone[place].share, -alone[place].pixels))
            for place in order[:-1]:
                kept += groups[place]
                found = measure(kept)
                tell(f"{len(kept)} layers in float: {found.share:.2f} of the boxes stay in place")
                if found.share >= AGREEMENT:
                    break
            else:
                raise ValueError(
                    f"With int8 weights only {found.share:.2f} of the boxes stay within {PIXELS:g} pixels, fewer than "
                    f"{AGREEMENT:g}; export in float, or calibrate on other pictures."
                )
        replaced = _put_in_place(Path(work), folder)
    return _record(layers, groups, kept, alone, found, len(pictures)), replaced


def _put_in_place(work: Path, folder: Path) -> list[Path]:
    replaced = []
    for path in sorted(work.iterdir()):
        # Under another name first: OpenVINO maps the float file into memory.
        copy = folder / f"{path.name}.int8"
        shutil.copyfile(path, copy)
        os.replace(copy, folder / path.name)
        replaced.append(folder / path.name)
    return replaced


def _groups(layers: Mapping[str, Layers]) -> list[list[tuple[str, str]]]:
    """Return up to eight groups of neighbouring layers, as (role, name)."""
    every = [(role, name) for role, of_role in layers.items() for name in of_role.int8]
    bounds = np.linspace(0, len(every), min(_GROUPS, len(every)) + 1).round().astype(int)
    return [every[start:end] for start, end in pairwise(bounds)]


def _record(
    layers: Mapping[str, Layers],
    groups: Sequence[Sequence[tuple[str, str]]],
    kept: Sequence[tuple[str, str]],
    alone: Sequence[Agreement],
    found: Agreement,
    pictures: int,
) -> dict[str, Any]:
    return {
        "quantizer": f"nncf {importlib.metadata.version('nncf')}",
        "weights": "uint8 with a scale and a zero point for each output channel",
        "activations": "float32",
        "layers": sum(len(of_role.int8) for of_role in layers.values()) - len(kept),
        "float_layers": {
            "by measurement": [f"{role}: {name}" for role, name in kept],
            "always": [f"{role}: {name}" for role, of_role in layers.items() for name in of_role.float_only],
        },
        "calibration": {
            "pictures": pictures,
            "boxes": found.boxes,
            "boxes_within_2_pixels": round(found.share, 4),
            "median_pixels": round(found.pixels, 3),
            "mean_score_difference": round(found.score, 4),
        },
        "groups_alone": [
            {"first": group[0][1], "layers": len(group), "boxes_within_2_pixels": round(each.share, 4)}
            for group, each in zip(groups, alone, strict=False)
        ],
    }


class _Comparison:
    """Boxes of the float graphs on the calibration pictures, and those of other graphs beside them."""

    def __init__(self, folder: Path, pictures: Sequence[Image.Image]) -> None:
        self._folder = ExportedFolder.read(folder)
        detector = Detector(folder)
        search = detector.search(None if self._folder.labels is not None else _LABELS)
        self._pad = detector.tokenizer.pad_token_id
        self._chunks = search.asked.chunks
        self._pictures = [(each.size, prepared(each, self._folder.image, unit=False)) for each in pictures]
        self._float = list(self._boxes(self._folder.files))

    def measure(self, files: Mapping[str, Path]) -> Agreement:
        """Compare graphs with the float ones.

        Args:
            files: The file of each role.
        """
        distances, differences, stayed = [], [], []
        for (scores, boxes), (own_scores, own_boxes) in zip(self._float, self._boxes(files), strict=True):
            best, own_best = scores.argmax(1), own_scores.argmax(1)
            for query in np.argsort(-scores.max(1), kind="stable")[:_BOXES]:
                away = np.abs(own_boxes - boxes[query]).max(1)
                # A box with another label is only compared if no box has the same one.
                place = np.where(own_best == best[query], away, away + 1e6).argmin()
                difference = abs(own_scores[place].max() - scores[query].max())
                distances.append(away[place])
                differences.append(difference)
                same = own_best[place] == best[query]
                stayed.append(same and away[place] <= PIXELS and difference <= _SCORES)
        return Agreement(float(np.mean(stayed)), len(stayed), float(np.median(distances)), float(np.mean(differences)))

    def _boxes(self, files: Mapping[str, Path]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the scores (Q, N) and boxes (Q, 4) xyxy in pixels of every picture and prompt."""
        graphs = ExportedGraphs(replace(self._folder, files=dict(files)), None, self._pad)
        for (width, height), array in self._pictures:
            for chunk in self._chunks:
                ((logits, boxes),) = graphs.run([array], chunk.input_ids)
                centers, halves = boxes[:, :2], boxes[:, 2:] / 2
                corners = np.concatenate([centers - halves, centers + halves], axis=1)
                yield _label_scores(logits, chunk), corners * np.array([width, height, width, height])


def _label_scores(logits: np.ndarray, chunk: PromptChunk) -> np.ndarray:
    probabilities = 1 / (1 + np.exp(-np.clip(logits, -80, 80)))
    return np.stack([probabilities[:, start:end].max(-1) for start, end in chunk.spans], axis=1)
