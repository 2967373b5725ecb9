"""A shard as a Parquet file: a row for each picture, with its boxes or the reason why it has none."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..detection.coco_exchange import decode_masks, encode_masks
from ..detection.detections import Detections
from ..detection.exchange_values import encodable, kept_library

_METADATA = b"gdino_hf"
_NEED = "Labelling needs"


@dataclass(frozen=True)
class LabelRow:
    """The result of one picture: exactly one of `found` and `error` is set.

    Attributes:
        source: Its unique name, see `SourceItem`.
        found: Its detections, best first.
        error: Reason why there are none.
        place: Where the picture's content is, see `SourceItem`.
        masks: COCO's compressed run lengths of the mask of each box, which are small; `found` has no masks. None
            without a segmenter.
    """

    source: str
    found: Detections | None = None
    error: str | None = None
    place: tuple[Any, ...] | None = None
    masks: tuple[str, ...] | None = None

    @classmethod
    def of(cls, source: str, found: Detections) -> LabelRow:
        """Return the row of a picture's detections, with the masks compressed."""
        if found.masks is None:
            return cls(source, found)
        masks = tuple(mask["counts"] for mask in encode_masks(found.masks) or ())
        return cls(source, replace(found, masks=None), masks=masks)

    def detections(self) -> Detections:
        """Return the detections, with the masks decompressed.

        Raises:
            ValueError: There are none.
        """
        if self.found is None:
            raise ValueError(f"{self.source} has no detections ({self.error}).")
        if self.masks is None:
            return self.found
        width, height = self.found.size
        segments = [{"size": [height, width], "counts": counts} for counts in self.masks]
        return replace(self.found, masks=decode_masks(segments, self.found.size))


@dataclass(frozen=True)
class ShardCounts:
    """What a shard holds.

    Attributes:
        pictures: Number of pictures, failed ones too.
        boxes: Number of boxes.
        failed: Number of pictures that could not be used.
        first: Name of the first picture.
        last: Name of the last picture.
    """

    pictures: int
    boxes: int
    failed: int
    first: str = ""
    last: str = ""


def shard_schema(masks: bool = False) -> Any:
    """Return the Arrow schema of a shard, without metadata.

    Args:
        masks: Whether there is a column of masks.

    Raises:
        ImportError: pyarrow is not installed.
    """
    arrow = kept_library("pyarrow", _NEED, "label")
    real, whole, text = arrow.float32(), arrow.int32(), arrow.string()
    return arrow.schema(
        {
            "source": text,
            "status": text,
            "width": whole,
            "height": whole,
            "boxes": arrow.list_(arrow.list_(real, 4)),
            "scores": arrow.list_(real),
            "labels": arrow.list_(whole),
            "error": text,
            "place": text,
            **({"masks": arrow.list_(text)} if masks else {}),
        }
    )


def encode_shard(rows: Sequence[LabelRow], names: Sequence[str], settings: str, masks: bool = False) -> bytes:
    """Return a shard's file: equal rows give equal bytes.

    Args:
        rows: One for each picture, in order.
        names: All labels; the column "labels" indexes them, and they are in the file's metadata.
        settings: Digest of the settings that the rows were made with.
        masks: Whether the rows were made with a segmenter.

    Raises:
        ImportError: pyarrow is not installed.
    """
    parquet = kept_library("pyarrow.parquet", _NEED, "label")
    counts = {
        "pictures": len(rows),
        "boxes": sum(len(row.found) for row in rows if row.found is not None),
        "failed": sum(row.found is None for row in rows),
        "first": encodable(rows[0].source) if rows else "",
        "last": encodable(rows[-1].source) if rows else "",
    }
    metadata = {_METADATA: json.dumps({"labels": list(names), "settings": settings, **counts})}
    file = io.BytesIO()
    parquet.write_table(shard_table(rows, masks).replace_schema_metadata(metadata), file, compression="zstd")
    return file.getvalue()


def shard_table(rows: Sequence[LabelRow], masks: bool = False) -> Any:
    """Return rows as an Arrow table with the columns of a shard, without metadata.

    Args:
        rows: One for each picture, in order.
        masks: Whether there is a column of masks.

    Raises:
        ImportError: pyarrow is not installed.
    """
    arrow = kept_library("pyarrow", _NEED, "label")
    found = [row.found for row in rows]
    columns = {
        "source": [encodable(row.source) for row in rows],
        "status": [_status(row) for row in rows],
        "width": [None if each is None else each.size[0] for each in found],
        "height": [None if each is None else each.size[1] for each in found],
        "boxes": [[] if each is None else each.boxes.tolist() for each in found],
        "scores": [[] if each is None else each.scores.tolist() for each in found],
        "labels": [[] if each is None else each.labels.tolist() for each in found],
        "error": [encodable(row.error) for row in rows],
        "place": [None if row.place is None else json.dumps(row.place) for row in rows],
    }
    if masks:
        columns["masks"] = [[] if row.masks is None else list(row.masks) for row in rows]
    return arrow.table(columns, schema=shard_schema(masks))


def read_shard(content: bytes) -> Iterator[LabelRow]:
    """Yield the rows of a shard's file in order.

    Args:
        content: The file.

    Raises:
        ValueError: It is damaged.
    """
    parquet = kept_library("pyarrow.parquet", _NEED, "label")
    table = parquet.read_table(io.BytesIO(content))
    names = tuple(_metadata(table.schema)["labels"])
    for batch in table.to_batches(max_chunksize=1000):
        for row in batch.to_pylist():
            place = None if row["place"] is None else tuple(json.loads(row["place"]))
            if row["error"] is not None:
                yield LabelRow(row["source"], error=row["error"], place=place)
                continue
            found = Detections(
                np.array(row["boxes"], dtype=np.float32).reshape(-1, 4),
                np.array(row["scores"], dtype=np.float32),
                np.array(row["labels"], dtype=np.int64),
                names,
                (row["width"], row["height"]),
                source=row["source"],
            )
            masks = row.get("masks")
            yield LabelRow(row["source"], found, place=place, masks=None if masks is None else tuple(masks))


def read_counts(content: Any) -> ShardCounts:
    """Return what a shard holds, from its metadata alone.

    Args:
        content: The file's content, or its path.

    Raises:
        ValueError: It is damaged.
    """
    parquet = kept_library("pyarrow.parquet", _NEED, "label")
    schema = parquet.read_schema(io.BytesIO(content) if isinstance(content, bytes) else content)
    values = _metadata(schema)
    return ShardCounts(**{name: values[name] for name in ShardCounts.__dataclass_fields__})


def _metadata(schema: Any) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(schema.metadata[_METADATA])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("it is not a shard of labels") from error
    return values


def _status(row: LabelRow) -> str:
    if row.found is None:
        return "failed"
    return "found" if len(row.found) else "nothing"
