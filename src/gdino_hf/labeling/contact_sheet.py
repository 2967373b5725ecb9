"""A contact sheet of a run of labelling: some pictures with their boxes and masks, to look at before training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..detection.coco_exchange import decode_masks
from ..model.picture_pixels import load_image
from ..visualize import draw_detections
from ..whole_files import whole_file
from .label_results import shard_rows
from .label_store import LabelStore, finished_shards
from .shard_files import LabelRow
from .shard_labels import PictureReader
from .source_items import SourceItem

_TILE, _MARGIN, _BACKGROUND = 240, 6, (255, 255, 255)


def contact_sheet(folder: str | Path, path: str | Path, number: int = 24, columns: int = 6) -> int:
    """Draw pictures that are spread evenly over those of a run in which something was found, with masks if it made any.

    Args:
        folder: Folder of results of `label_pictures` or `gdino label`.
        path: Picture file to write, such as sheet.jpg.
        number: Most pictures on the sheet.
        columns: Pictures side by side.

    Returns:
        Number of pictures on the sheet. Those that cannot be read any more are passed over.

    Raises:
        OSError: The sheet cannot be written.
        ValueError: There is no picture with a find, or a number is below 1.
    """
    if number < 1 or columns < 1:
        raise ValueError(f"number is {number} and columns is {columns}; give at least 1.")
    store = LabelStore(folder)
    with_finds = sum(1 for _ in _found(store))
    chosen = {round(place * with_finds / number) for place in range(number)}
    read = PictureReader()
    tiles = []
    for place, row in enumerate(_found(store)):
        if place in chosen:
            try:
                tiles.append(_tile(read(SourceItem(row.source, row.place)), row))
            except (OSError, ValueError):
                continue
    if not tiles:
        raise ValueError(f"{store.folder} has no picture with a find; lower the threshold, or label other pictures.")
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    step = _TILE + _MARGIN
    sheet = Image.new("RGB", (columns * step + _MARGIN, rows * step + _MARGIN), _BACKGROUND)
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (_MARGIN + place % columns * step, _MARGIN + place // columns * step))
    with whole_file(path) as unfinished:
        sheet.save(unfinished)
    return len(tiles)


def _found(store: LabelStore) -> Iterator[LabelRow]:
    rows = shard_rows(store, sorted(finished_shards(store)))
    return (row for row in rows if row.found is not None and len(row.found))


def _tile(content: Any, row: LabelRow) -> Image.Image:
    """Return a picture with its boxes and masks, at most as large as a tile."""
    assert row.found is not None
    picture = load_image(content)
    scale = _TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Resized first, so that names are readable.
    factors = [size[0] / picture.width, size[1] / picture.height] * 2
    result = row.found.as_result() | {"boxes": row.found.boxes * factors}
    if row.masks is not None:
        result["masks"] = [_small_mask(counts, row.found.size, size) for counts in row.masks]
    return draw_detections(picture.resize(size), result)


def _small_mask(counts: str, size: tuple[int, int], smaller: tuple[int, int]) -> np.ndarray:
    """Return a mask, (height, width) bool, at another size; one at a time, since a picture's size takes much memory."""
    mask = decode_masks([{"size": [size[1], size[0]], "counts": counts}], size)[0]
    return np.asarray(Image.fromarray(mask).resize(smaller))
