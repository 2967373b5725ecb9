"""COCO: rows of results, a data set with its images and categories, and run-length encoded masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .exchange_values import (
    box_table,
    corner_sizes,
    decimal,
    entry,
    from_corner_sizes,
    kept_library,
    picture_name,
    say_left_out,
    values_of,
    whole_numbers,
)


def category_numbers(names: Sequence[str], category_ids: Mapping[str, int] | None) -> list[int]:
    """Return the category id of each label: the one given, or the label's place counted from 1.

    Raises:
        ValueError: A label has no id.
    """
    if category_ids is None:
        return list(range(1, len(names) + 1))
    missing = next((name for name in names if name not in category_ids), None)
    if missing is not None:
        raise ValueError(f"category_ids has no id for {missing!r}; give one for each label.")
    return [int(category_ids[name]) for name in names]


def result_rows(
    found: Any, image_id: Any, category_ids: Mapping[str, int] | None, polygons: bool = False
) -> list[dict[str, Any]]:
    """Return `Detections` as rows of COCO's results format; see `Detections.to_coco`."""
    numbers = category_numbers(found.names, category_ids)
    masks = _segments(found) if polygons else encode_masks(found.masks)
    rows = []
    for place, (box, score) in enumerate(
        zip(corner_sizes(found.boxes).tolist(), decimal(found.scores).tolist(), strict=True)
    ):
        row = {"image_id": image_id, "category_id": numbers[found.labels[place]], "bbox": box, "score": score}
        if masks is not None:
            row["segmentation"] = masks[place]
        if found.track_ids is not None:
            row["track_id"] = int(found.track_ids[place])
        if found.spans is not None:
            row["tokens_positive"] = [list(span) for span in found.spans[place]]
        rows.append(row)
    return rows


def image_row(found: Any, image_id: int, file_name: str | None) -> dict[str, Any]:
    """Return the entry of a picture in the "images" of a COCO data set."""
    width, height = found.size
    row = {"id": image_id, "file_name": picture_name(found, file_name), "width": width, "height": height}
    return row if found.caption is None else {**row, "caption": found.caption}


def annotation_rows(
    found: Any,
    image_id: int,
    first_id: int,
    category_ids: Mapping[str, int] | None = None,
    polygons: bool = False,
) -> list[dict[str, Any]]:
    """Return the entries of a picture's boxes in the "annotations" of a COCO data set.

    Args:
        found: `Detections`.
        image_id: The picture's id.
        first_id: Id of the first box; ids of a data set are unique.
        category_ids: Category id of each label; their places from 1 by default.
        polygons: Whether masks are polygons instead of run lengths.
    """
    say_left_out(found, "COCO", "token_scores")
    rows = result_rows(found, image_id, category_ids, polygons)
    for place, row in enumerate(rows):
        area = float(found.masks[place].sum()) if found.masks is not None else round(row["bbox"][2] * row["bbox"][3], 2)
        # Some readers need the field also where there are boxes alone.
        row.setdefault("segmentation", [])
        row.update(id=first_id + place, area=area, iscrowd=0)
    return rows


def category_rows(names: Sequence[str], category_ids: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
    """Return the "categories" of a COCO data set."""
    numbers = category_numbers(names, category_ids)
    return [{"id": number, "name": name} for number, name in zip(numbers, names, strict=True)]


def data_set(
    found: Any, file_name: str | None, category_ids: Mapping[str, int] | None, polygons: bool = False
) -> dict[str, Any]:
    """Return `Detections` as a COCO data set of one picture; see `Detections.to_coco_dataset`."""
    return {
        "images": [image_row(found, 1, file_name)],
        "annotations": annotation_rows(found, 1, 1, category_ids, polygons),
        "categories": category_rows(found.names, category_ids),
    }


def read_rows(
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    size: tuple[int, int],
    category_ids: Mapping[str, int] | None,
    **others: Any,
) -> dict[str, Any]:
    """Return the arguments of `Detections` for results or annotations of one picture.

    Raises:
        ValueError: A row is malformed or of an unknown category, or rows are of several pictures.
    """
    what = "The COCO row"
    pictures = {str(row["image_id"]) for row in rows if isinstance(row, Mapping) and "image_id" in row}
    if len(pictures) > 1:
        raise ValueError(f"The rows are of {len(pictures)} pictures; give those of one.")
    name_of = dict(zip(category_numbers(names, category_ids), names, strict=True))
    texts = []
    for row in rows:
        number = entry(row, "category_id", what)
        if number not in name_of:
            raise ValueError(f"A row has category_id {number!r}, but the labels have {sorted(name_of)}.")
        texts.append(name_of[number])
    boxes = from_corner_sizes(box_table([entry(row, "bbox", what) for row in rows]))
    spans: list[Any] = [row.get("tokens_positive") for row in rows]
    if spans and all(span is not None for span in spans):
        others["spans"] = tuple(tuple((int(begin), int(end)) for begin, end in span) for span in spans)
    segments = [row.get("segmentation") for row in rows]
    if segments and all(segments):
        others["masks"] = decode_masks(segments, size)
    others["track_ids"] = whole_numbers(row.get("track_id") for row in rows)
    return values_of(boxes, texts, size, names, [row.get("score") for row in rows], **others)


def read_data_set(content: Mapping[str, Any], image: str | int | None) -> dict[str, Any]:
    """Return the arguments of `Detections` for one picture of a COCO data set.

    Raises:
        ValueError: The picture is not in it, or there are several and none was chosen.
    """
    pictures, annotations, categories = (
        list(entry(content, key, "The COCO data set")) for key in ("images", "annotations", "categories")
    )
    chosen = [row for row in pictures if image is None or image in (row["id"], row["file_name"])]
    if len(chosen) != 1:
        raise ValueError(
            f"{len(chosen)} of the {len(pictures)} pictures fit image={image!r}; give the id or the file_name of one."
        )
    row = chosen[0]
    ordered = sorted(categories, key=lambda category: category["id"])
    numbers = {str(category["name"]): category["id"] for category in ordered}
    boxes = [annotation for annotation in annotations if annotation["image_id"] == row["id"]]
    others = {"source": row["file_name"], "caption": row.get("caption")}
    return read_rows(boxes, list(numbers), (row["width"], row["height"]), numbers, **others)


def encode_masks(masks: np.ndarray | None) -> list[dict[str, Any]] | None:
    """Return (N, height, width) bool masks as COCO's compressed run lengths, with text that JSON can hold.

    Raises:
        ImportError: pycocotools is not installed.
    """
    if masks is None:
        return None
    coco = kept_library("pycocotools.mask", "COCO masks need")
    encoded = [coco.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    return [{"size": [int(side) for side in mask["size"]], "counts": mask["counts"].decode()} for mask in encoded]


def _segments(found: Any) -> list[Any] | None:
    """Return masks as lists of polygons [x1, y1, x2, y2, ...], and empty ones, which have none, as run lengths."""
    if found.masks is None:
        return None
    return [
        [polygon.ravel().tolist() for polygon in polygons] or (encode_masks(mask[None]) or [])[0]
        for polygons, mask in zip(found.polygons(), found.masks, strict=True)
    ]


def mask_area(mask: dict[str, Any]) -> float:
    """Return the number of pixels of a mask that `encode_masks` returned.

    Raises:
        ImportError: pycocotools is not installed.
    """
    return float(kept_library("pycocotools.mask", "COCO masks need").area(mask))


def decode_masks(segments: Sequence[Any], size: tuple[int, int]) -> np.ndarray:
    """Return COCO segments (polygons or run lengths, compressed or not) as (N, height, width) bool masks.

    Args:
        segments: Segment of each box.
        size: (width, height) of the picture in pixels.

    Raises:
        ImportError: pycocotools is not installed.
        ValueError: A segment is of a picture of another size.
    """
    coco = kept_library("pycocotools.mask", "COCO masks need")
    width, height = size
    masks = np.zeros((len(segments), height, width), dtype=bool)
    for place, segment in enumerate(segments):
        if not isinstance(segment, Mapping):
            segment = coco.merge(coco.frPyObjects(segment, height, width))
        elif list(segment["size"]) != [height, width]:
            raise ValueError(f"A mask is of a picture of {segment['size']} (height, width), not {[height, width]}.")
        elif not isinstance(segment["counts"], (str, bytes)):
            segment = coco.frPyObjects(segment, height, width)
        masks[place] = coco.decode(segment)
    return masks
