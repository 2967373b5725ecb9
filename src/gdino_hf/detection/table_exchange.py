"""Tables with a row for each box (pandas, Arrow, CSV), and rows of Hugging Face data sets with their `objects`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .coco_exchange import decode_masks, encode_masks
from .exchange_values import (
    box_table,
    corner_sizes,
    decimal,
    encodable,
    entry,
    from_corner_sizes,
    kept_library,
    say_left_out,
    values_of,
    whole_numbers,
)
from .spreadsheet_cells import original_label

COLUMNS = ("source", "width", "height", "label", "label_index", "score", "x1", "y1", "x2", "y2")
"""Columns of every table; `track_id` and `mask` (COCO's compressed run lengths) follow where there are any."""

_SIDES = ("x1", "y1", "x2", "y2")
_METADATA = b"gdino_hf"
# What a table's rows do not hold, because it belongs to the whole picture.
_PICTURE_VALUES = ("names", "size", "source", "presence", "caption", "colors")


def table_columns(found: Any) -> dict[str, Any]:
    """Return the columns of `Detections` as a table, N values each.

    Args:
        found: `Detections`.
    """
    say_left_out(found, "A table", "spans")
    number, (width, height) = len(found), found.size
    columns = {
        "source": [found.source] * number,
        "width": np.full(number, width, dtype=np.int64),
        "height": np.full(number, height, dtype=np.int64),
        "label": found.text_labels,
        "label_index": found.labels,
        "score": found.scores,
        **{side: found.boxes[:, place] for place, side in enumerate(_SIDES)},
    }
    if found.track_ids is not None:
        columns["track_id"] = found.track_ids
    masks = encode_masks(found.masks)
    if masks is not None:
        columns["mask"] = [mask["counts"] for mask in masks]
    return columns


def text_rows(found: Any) -> list[list[Any]]:
    """Return the rows of `Detections` in the order of `COLUMNS`, for a text file."""
    say_left_out(found, "CSV", "masks", "track_ids", "spans")
    boxes, scores = decimal(found.boxes).tolist(), decimal(found.scores).tolist()
    return [
        [found.source, *found.size, label, index, score, *box]
        for label, index, score, box in zip(found.text_labels, found.labels.tolist(), scores, boxes, strict=True)
    ]


def data_frame(found: Any) -> Any:
    """Return `Detections` as a pandas data frame; see `Detections.to_pandas`."""
    pandas = kept_library("pandas", "A data frame needs")
    frame = pandas.DataFrame(table_columns(found))
    frame.attrs["gdino_hf"] = _picture_values(found)
    return frame


def read_data_frame(frame: Any, **given: Any) -> dict[str, Any]:
    """Return the arguments of `Detections` for a data frame of one picture; see `Detections.from_pandas`."""
    rows = {name: frame[name].tolist() for name in frame.columns}
    return _read_columns(rows, frame.attrs.get("gdino_hf", {}), given)


def table_schema(picture_values: Mapping[str, Any]) -> Any:
    """Return the Arrow schema of every table.

    Args:
        picture_values: What the rows do not hold, as JSON can hold it.

    Raises:
        ImportError: pyarrow is not installed.
    """
    arrow = kept_library("pyarrow", "An Arrow table needs")
    text, whole, real = arrow.string(), arrow.int64(), arrow.float32()
    kinds = (text, whole, whole, text, whole, real, real, real, real, real, whole, text)
    columns = list(zip((*COLUMNS, "track_id", "mask"), kinds, strict=True))
    return arrow.schema(columns, metadata={_METADATA: json.dumps(picture_values)})


def arrow_table(found: Any, source: str | None = None) -> Any:
    """Return `Detections` as an Arrow table, with another source if one is given; see `Detections.to_arrow`."""
    arrow = kept_library("pyarrow", "An Arrow table needs")
    columns, schema = table_columns(found), table_schema(_picture_values(found))
    columns["source"] = [encodable(found.source if source is None else source)] * len(found)
    return arrow.table({name: columns.get(name, [None] * len(found)) for name in schema.names}, schema=schema)


def read_arrow_table(table: Any, **given: Any) -> dict[str, Any]:
    """Return the arguments of `Detections` for an Arrow table of one picture; see `Detections.from_arrow`."""
    kept = json.loads((table.schema.metadata or {}).get(_METADATA, b"{}"))
    return _read_columns(table.to_pydict(), kept, given)


def _picture_values(found: Any) -> dict[str, Any]:
    """Return what a table's rows do not hold, as JSON can hold it."""
    values = {name: getattr(found, name) for name in _PICTURE_VALUES}
    as_dicts = {name: dict(values[name]) for name in ("presence", "colors") if values[name] is not None}
    parts = [name for name in ("masks", "track_ids") if getattr(found, name) is not None]
    return {**values, **as_dicts, "names": list(found.names), "size": list(found.size), "parts": parts}


def _read_columns(columns: Mapping[str, Sequence[Any]], kept: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    missing = next((name for name in ("label", *_SIDES) if name not in columns), None)
    if missing is not None:
        raise ValueError(f"The table has no column {missing!r}; it needs {', '.join(('label', *_SIDES))}.")
    # A missing text is None in Arrow and may be NaN in pandas.
    sources = {value if isinstance(value, str) else None for value in columns.get("source", ())}
    sizes = set(zip(columns.get("width", ()), columns.get("height", ()), strict=True))
    if len(sources) > 1 or len(sizes) > 1:
        raise ValueError(
            f"The table has boxes of {max(len(sources), len(sizes))} pictures; split it by `source` first."
        )
    values = {
        "names": kept.get("names"),
        "size": next(iter(sizes), kept.get("size")),
        "source": next(iter(sources), kept.get("source")),
        **{name: kept[name] for name in ("presence", "caption", "colors") if kept.get(name) is not None},
        **{name: value for name, value in given.items() if value is not None},
    }
    size = values["size"]
    values["size"] = None if size is None else tuple(int(side) for side in size)
    tracks = whole_numbers(value if value == value else None for value in columns.get("track_id", ()))
    counts = [value for value in columns.get("mask", ()) if isinstance(value, str)]
    if counts and values["size"] is not None:
        width, height = values["size"]
        segments = [{"size": [height, width], "counts": text} for text in counts]
        values["masks"] = decode_masks(segments, (width, height))
    boxes = list(zip(*(columns[side] for side in _SIDES), strict=True))
    if not boxes:
        # No row tells that there were masks or track ids.
        tracks = [] if "track_ids" in kept.get("parts", ()) else None
        if "masks" in kept.get("parts", ()):
            values["masks"] = np.zeros((0, *values["size"][::-1]), dtype=bool)
    labels = [original_label(str(label), values["names"]) for label in columns["label"]]
    return values_of(boxes, labels, scores=columns.get("score"), track_ids=tracks, **values)


def objects_row(found: Any, image_id: int) -> dict[str, Any]:
    """Return `Detections` as a row of a Hugging Face data set; see `Detections.to_objects`."""
    say_left_out(found, "A row with objects", "masks", "track_ids", "spans")
    width, height = found.size
    boxes = corner_sizes(found.boxes)
    objects = {
        "id": list(range(len(found))),
        "area": np.round(boxes[:, 2] * boxes[:, 3], 2).tolist(),
        "bbox": boxes.tolist(),
        "category": found.labels.tolist(),
        "score": decimal(found.scores).tolist(),
    }
    return {"image_id": image_id, "width": width, "height": height, "objects": objects}


def read_objects_row(
    row: Mapping[str, Any], names: Sequence[str], size: tuple[int, int] | None, source: str | None
) -> dict[str, Any]:
    """Return the arguments of `Detections` for a row of a Hugging Face data set.

    Raises:
        ValueError: The row has no objects, or a category has no name.
    """
    objects = entry(row, "objects", "The row")
    if not isinstance(objects, Mapping):
        # Some data sets hold a list of objects instead of a column for each value.
        keys = ("bbox", "category", "score")
        objects = {key: [item.get(key) for item in objects] for key in keys}
    texts = []
    for category in entry(objects, "category", "The row's objects"):
        if not isinstance(category, str) and not 0 <= category < len(names):
            raise ValueError(f"A box has category {category}, but there are {len(names)} names; name all categories.")
        texts.append(category if isinstance(category, str) else names[category])
    if size is None and "width" in row and "height" in row:
        size = (row["width"], row["height"])
    table = from_corner_sizes(box_table(entry(objects, "bbox", "The row's objects")))
    return values_of(table, texts, size, names, objects.get("score"), source=source)


def objects_features(names: Sequence[str]) -> Any:
    """Return the features of a Hugging Face data set whose rows are those of `Detections.to_objects`.

    Args:
        names: All labels, which become the names of a `ClassLabel`.

    Returns:
        `datasets.Features` with image_id, width, height and objects; add "image" to keep the pictures in it.

    Raises:
        ImportError: datasets is not installed.
    """
    datasets = kept_library("datasets", "Features need")
    whole, real = datasets.Value("int64"), datasets.Value("float64")
    objects = {
        "id": datasets.List(whole),
        "area": datasets.List(real),
        "bbox": datasets.List(datasets.List(real, length=4)),
        "category": datasets.List(datasets.ClassLabel(names=list(names))),
        "score": datasets.List(real),
    }
    return datasets.Features({"image_id": whole, "width": whole, "height": whole, "objects": objects})
