"""COCO detection files as a lazily decoded `datasets.Dataset`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def read_coco(annotations: str | Path, images: str | Path | None = None) -> Dataset:
    """Read a COCO detection file; photographs are decoded when a row is read, not before.

    Args:
        annotations: The COCO json, boxes as absolute xywh.
        images: Folder of the photographs; the folder `images` beside the json by default.

    Returns:
        One row per image, in file order: `image` (PIL), `image_id`, `width`, `height`, `boxes` ((N, 4) xyxy in
        pixels, clipped to the image), `names` (N) and `crowd` (N). Boxes without area are left out.

    Raises:
        ValueError: The json is not a COCO detection file, or names a photograph that does not exist.
    """
    from datasets import Dataset, Features, Image, List, Value

    content = _load(annotations)
    folder = Path(images) if images is not None else Path(annotations).parent / "images"
    names = {category["id"]: category["name"] for category in content["categories"]}
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)

    rows = []
    for image in content["images"]:
        path = folder / image["file_name"]
        if not path.is_file():
            raise ValueError(f"{annotations} names the photograph {path}, which does not exist; pass images=FOLDER.")
        rows.append({"image": str(path), **_row(image, by_image[image["id"]], names)})
    features = Features(
        {
            "image": Image(),
            "image_id": Value("int64"),
            "width": Value("int32"),
            "height": Value("int32"),
            "boxes": List(List(Value("float32"), length=4)),
            "names": List(Value("string")),
            "crowd": List(Value("bool")),
        }
    )
    return Dataset.from_list(rows, features=features)


def category_names(annotations: str | Path) -> list[str]:
    """The category names of a COCO file, in the order of their ids."""
    return [category["name"] for category in sorted(_load(annotations)["categories"], key=lambda c: c["id"])]


def _load(annotations: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(annotations).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{annotations} cannot be read as COCO json ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{annotations} is not a COCO detection file: it holds a {type(content).__name__}, not a dict."
        )
    missing = {"images", "annotations", "categories"} - content.keys()
    if missing:
        raise ValueError(f"{annotations} is not a COCO detection file: it has no {', '.join(sorted(missing))}.")
    return content


def _row(image: dict[str, Any], annotations: list[dict[str, Any]], names: dict[int, str]) -> dict[str, Any]:
    width, height = image["width"], image["height"]
    boxes, labels, crowd = [], [], []
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        box = [max(0.0, x), max(0.0, y), min(float(width), x + w), min(float(height), y + h)]
        if box[2] <= box[0] or box[3] <= box[1]:
            continue
        if annotation["category_id"] not in names:
            raise ValueError(
                f"Annotation {annotation.get('id')} has category_id {annotation['category_id']}, which is not among "
                "the file's categories; add the category or drop the annotation."
            )
        boxes.append(box)
        labels.append(names[annotation["category_id"]])
        crowd.append(bool(annotation.get("iscrowd", 0)))
    return {
        "image_id": image["id"],
        "width": width,
        "height": height,
        "boxes": boxes,
        "names": labels,
        "crowd": crowd,
    }
