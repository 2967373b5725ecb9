"""One search over many pictures: an exported graph run over batches of pictures and all prompts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..detection.detections import Detections, name_of
from ..detection.exported_folder import ExportedFolder, ExportError
from ..detection.graph_sessions import Session, open_sessions, run_graph
from ..detection.prepared_pictures import PreparedPicture
from ..detection.tiles import tile_areas, with_tiles
from ..model.pixel_values import prepared
from ..model.printable import printable
from ..model.text_prompt import PromptChunk
from .array_selection import ArraySelection, Found

_IMAGE_INPUTS = ("pixel_values", "pixel_mask", "image_sizes")
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Text features of so many prompts are kept.
_MOST_TEXTS = 1024


class ExportedGraphs:
    """The graphs of an exported folder: pixels and tokens in, token logits and boxes out.

    Args:
        folder: The folder.
        threads: Number of threads that one run uses; None leaves it to the library.
        pad_token_id: Token that fills prompts where the graph has a fixed length of text.

    Raises:
        ExportError: The graphs cannot be loaded.
    """

    def __init__(self, folder: ExportedFolder, threads: int | None, pad_token_id: int) -> None:
        self.folder, self._pad = folder, pad_token_id
        sessions = open_sessions(folder, threads)
        self._text: Session | None = sessions.get("text")
        self._main: Session = sessions["image" if folder.variant == "split" else "model"]
        self._features: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()
        shape = self._main.inputs["pixel_values"].shape
        self._most = shape[0]
        self.size = shape[2:]

    def check_size(self, array: np.ndarray) -> None:
        """Raise an ExportError if a graph of fixed size cannot take pixels (C, H, W)."""
        if any(fixed is not None and fixed != given for fixed, given in zip(self.size, array.shape[1:], strict=True)):
            raise ExportError(
                f"{printable(self.folder.path)} takes pictures of {self.size[0]}x{self.size[1]} pixels (height x "
                f"width), and this one has {array.shape[1]}x{array.shape[2]} after resizing; export the model with "
                "dynamic sizes."
            )

    def run(self, arrays: Sequence[np.ndarray], tokens: tuple[int, ...]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Run pictures with one prompt; those of one size together, because padding would change what a picture gives.

        Args:
            arrays: (C, H, W) float32 pixels of each picture.
            tokens: The prompt; empty if it is baked in.

        Yields:
            Token logits (Q, T) and boxes (Q, 4) cxcywh in [0, 1] of each picture.
        """
        alike: dict[tuple[int, ...], list[int]] = {}
        for place, array in enumerate(arrays):
            alike.setdefault(array.shape, []).append(place)
        found: list[Any] = [None] * len(arrays)
        for places in alike.values():
            for place, result in zip(places, self._run([arrays[each] for each in places], tokens), strict=True):
                found[place] = result
        yield from found

    def _run(self, arrays: Sequence[np.ndarray], tokens: tuple[int, ...]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Run pictures of one size."""
        most = self._most or len(arrays)
        for start in range(0, len(arrays), most):
            part = arrays[start : start + most]
            # A graph with a fixed batch gets its last pictures several times.
            filled = [*part, *[part[-1]] * (most - len(part))] if self._most else part
            inputs = {**self._images(filled), **self._prompt(tokens, len(filled))}
            outputs = run_graph(self._main, inputs, self.folder)
            logits, boxes = outputs["logits"], outputs["pred_boxes"]
            if np.isnan(logits).any() or not np.isfinite(boxes).all():
                raise ValueError(
                    f"The outputs of {printable(self.folder.path)} hold NaN; export the model again, in float32."
                )
            yield from zip(logits[: len(part)], boxes[: len(part)], strict=True)

    def _images(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        pixels = np.stack(arrays).astype(np.float32, copy=False)
        mask = np.ones((len(arrays), *arrays[0].shape[1:]), dtype=np.int64)
        sizes = np.array([array.shape[1:] for array in arrays], dtype=np.int64)
        return self._taken(self._main, dict(zip(_IMAGE_INPUTS, (pixels, mask, sizes), strict=True)))

    def _prompt(self, tokens: tuple[int, ...], rows: int) -> dict[str, np.ndarray]:
        """Return what the main graph takes of a prompt, for a number of rows."""
        if not tokens:
            return {}
        found = self._taken(self._main, self._tokens(self._main, tokens))
        if self._text is not None:
            found |= self._taken(self._main, self._text_features(tokens))
        return {name: np.repeat(value, rows, axis=0) for name, value in found.items()}

    def _tokens(self, session: Session, tokens: tuple[int, ...]) -> dict[str, np.ndarray]:
        fixed = session.inputs["input_ids"].shape[1] if "input_ids" in session.inputs else None
        length = len(tokens) if fixed is None else fixed
        if len(tokens) > length:
            raise ExportError(
                f"The labels have {len(tokens)} tokens, and {printable(self.folder.path)} takes {length}; ask for "
                "fewer labels at a time, or export the model with dynamic text."
            )
        ids = np.full((1, length), self._pad, dtype=np.int64)
        ids[0, : len(tokens)] = tokens
        mask = (np.arange(length) < len(tokens)).astype(np.int64)[None]
        return dict(zip(_TEXT_INPUTS, (ids, mask, np.zeros_like(ids)), strict=True))

    def _text_features(self, tokens: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return the outputs of the text graph, which are computed once for a prompt."""
        assert self._text is not None
        with self._lock:
            found = self._features.get(tokens)
        if found is None:
            inputs = self._taken(self._text, self._tokens(self._text, tokens))
            found = run_graph(self._text, inputs, self.folder)
            with self._lock:
                if len(self._features) >= _MOST_TEXTS:
                    self._features.clear()
                self._features[tokens] = found
        return found

    @staticmethod
    def _taken(session: Session, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return those arrays that a graph has an input for, in its types."""
        return {
            name: value.astype(session.inputs[name].dtype, copy=False)
            for name, value in arrays.items()
            if name in session.inputs
        }


@dataclass(frozen=True)
class ExportedQuestion:
    """What to look for, ready for exported graphs.

    Attributes:
        names: Labels that results may carry; label indices from `len(names)` on are negative labels.
        chunks: The prompts.
        select: Rule by which scores become detections.
        colors: "#rrggbb" of labels that have a colour of their own.
    """

    names: tuple[str, ...]
    chunks: tuple[PromptChunk, ...]
    select: ArraySelection
    colors: Mapping[str, str]


class ExportedSearch:
    """Runs exported graphs over batches of pictures, always for the same labels.

    Args:
        graphs: The graphs.
        asked: What to look for.
        tiles: Side in pixels of overlapping tiles in which larger pictures are looked at beside the whole, or None.
        overlap: Part of a tile's side that it shares with its neighbour, in [0, 1).
        batch_size: Largest number of tiles in one run.

    Raises:
        ValueError: `tiles` or `overlap` is out of its range.
    """

    lanes = 1

    def __init__(
        self, graphs: ExportedGraphs, asked: ExportedQuestion, *, tiles: int | None, overlap: float, batch_size: int
    ) -> None:
        if tiles is not None:
            tile_areas((1, 1), tiles, overlap)
        self._graphs, self.asked = graphs, asked
        self._tiles, self._overlap, self._batch_size = tiles, overlap, batch_size

    def in_lanes(
        self, function: Callable[[Any], Any], batches: Generator[Any, None, None], pictures: Callable[[Any], Any]
    ) -> Generator[Any, None, None]:
        """Call a function with one batch after the other; a graph uses all of its threads for each."""
        with closing(batches):
            for batch in batches:
                yield function(batch)

    def prepare(self, image: Image.Image, source: Any = None) -> PreparedPicture:
        """Make the graph's inputs of one upright RGB picture, in any thread.

        Raises:
            ValueError: The picture has another size than the graph takes, or would be too large.
        """
        array = prepared(image, self._graphs.folder.image, unit=False)
        self._graphs.check_size(array)
        return PreparedPicture(image, source, {"pixel_values": array[None]})

    def __call__(self, pictures: Sequence[PreparedPicture]) -> list[Detections]:
        """Detect in a batch of pictures; returns the detections of each, best first."""
        found = self._run(pictures)
        if self._tiles is None:
            return found
        tiling: Any = {"tiles": self._tiles, "overlap": self._overlap, "batch_size": self._batch_size}
        return [
            with_tiles(picture.image, whole, self._in_tiles, self.asked.select, **tiling)
            for picture, whole in zip(pictures, found, strict=True)
        ]

    def _run(self, pictures: Sequence[PreparedPicture]) -> list[Detections]:
        select, names = self.asked.select, self.asked.names
        arrays = [picture.inputs["pixel_values"][0] for picture in pictures]
        parts: list[list[Found]] = [[] for _ in pictures]
        presence: list[dict[int, float]] = [{} for _ in pictures]
        for chunk in self.asked.chunks:
            for place, (logits, boxes) in enumerate(self._graphs.run(arrays, chunk.input_ids)):
                scores = select.scored(logits, chunk)
                parts[place].append(select.select(scores, boxes, len(names)))
                presence[place] |= zip(scores.labels.tolist(), scores.scores.max(0).tolist(), strict=True)
        merged = [select.merged(of_one, picture.image.size) for of_one, picture in zip(parts, pictures, strict=True)]
        return [
            Detections(
                found.boxes,
                found.scores,
                found.labels,
                names,
                picture.image.size,
                presence={name: highest[index] for index, name in enumerate(names)},
                source=name_of(picture.source),
                colors=self.asked.colors,
            )
            for found, picture, highest in zip(merged, pictures, presence, strict=True)
        ]

    def _in_tiles(self, crops: list[Image.Image]) -> list[Detections]:
        return self._run([self.prepare(crop) for crop in crops])
