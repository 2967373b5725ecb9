"""What there is to find: per image the true boxes in the form the metrics take."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data.coco import coco_image_path, image_folder, load_coco, names_by_id
from ..data.negatives import name_key
from ..data.rows import parse_box
from ..model.text_prompt import shorten


@dataclass(frozen=True)
class GroundTruth:
    """The truth of a data set.

    Attributes:
        labels: What the numbers in references mean, and the prompt.
        references: By image id: "boxes" (M, 4) xyxy in pixels, "labels" (M,), "crowd" (M,), "area" (M,); of LVIS also
            "negative_labels" and "not_exhaustive_labels" (lists of numbers).
        rows: What `predict` takes: "image" and "image_id" each.
        frequencies: Of LVIS, "r", "c" or "f" per label: rare, common, frequent.
        category_ids: Of a COCO file, the id of each label.
    """

    labels: list[str]
    references: dict[Any, dict[str, Any]]
    rows: Any
    frequencies: list[str] = field(default_factory=list)
    category_ids: list[int] = field(default_factory=list)

    @property
    def is_federated(self) -> bool:
        """Whether only some labels were looked for in each image, as in LVIS."""
        return any("negative_labels" in reference for reference in self.references.values())

    @property
    def has_captions(self) -> bool:
        """Whether it holds phrases of captions instead of labels."""
        return any("phrases" in reference for reference in self.references.values())

    def paired_with(
        self, predictions: Iterable[Mapping[str, Any]]
    ) -> tuple[list[Mapping[str, Any]], list[dict[str, Any]]]:
        """Predictions and references of the same images, in the order of image ids.

        Args:
            predictions: With "image_id"; images without any are left out.

        Returns:
            As many predictions as references.

        Raises:
            ValueError: A prediction is of an image the data set does not have.
        """
        by_image = {prediction["image_id"]: prediction for prediction in predictions}
        unknown = [image for image in by_image if image not in self.references]
        if unknown:
            raise ValueError(
                f"The predictions are of image {unknown[0]!r}, which the data set does not have; give the data set "
                "they were made on."
            )
        # Numbers first: some files mix them with text.
        order = sorted(by_image, key=lambda image: (isinstance(image, str), image))
        return [by_image[image] for image in order], [self.references[image] for image in order]

    def restricted_to(self, labels: Sequence[str]) -> GroundTruth:
        """The truth of some labels; the others are as if nobody had annotated them.

        Args:
            labels: Names, in the order they shall be numbered; one that the data set lacks is never found.
        """
        place = {name_key(label): number for number, label in enumerate(labels)}
        number = {old: place[name_key(name)] for old, name in enumerate(self.labels) if name_key(name) in place}

        def kept(reference: dict[str, Any]) -> dict[str, Any]:
            keep = np.array([int(label) in number for label in reference["labels"]], dtype=bool)
            result = {name: reference[name][keep] for name in ("boxes", "crowd", "area")}
            result["labels"] = np.array([number[int(label)] for label in reference["labels"][keep]], dtype=np.int64)
            for name in ("negative_labels", "not_exhaustive_labels"):
                if name in reference:
                    result[name] = [number[label] for label in reference[name] if label in number]
            return result

        frequency = {number[old]: value for old, value in enumerate(self.frequencies) if old in number}
        return GroundTruth(
            labels=list(labels),
            references={image: kept(reference) for image, reference in self.references.items()},
            rows=self.rows,
            frequencies=[frequency.get(label, "f") for label in range(len(labels))] if self.frequencies else [],
        )


def coco_ground_truth(annotations: str | Path, images: str | Path | None = None) -> GroundTruth:
    """The truth of a COCO or LVIS file, to the last digit: boxes neither clipped nor rounded, areas as annotated.

    Photographs are not looked for: one that is missing fails where it is read, by its name.

    Args:
        annotations: The json, boxes as absolute xywh.
        images: Folder of the photographs, by default as `read_coco` finds it.

    Returns:
        The truth, labels in the order of their ids.

    Raises:
        ValueError: It is not a COCO detection file, or holds something that cannot be used.
    """
    content, folder = load_coco(annotations), image_folder(annotations, images)
    names = names_by_id(content, annotations)
    number = {category: place for place, category in enumerate(names)}
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        if isinstance(annotation.get("image_id"), (int, float, str)):
            by_image[annotation["image_id"]].append(annotation)
    references, rows = {}, []
    for place, image in enumerate(content["images"]):
        image_id = image.get("id")
        try:
            if not isinstance(image_id, (int, float, str)):
                raise ValueError(f"its id is {shorten(image_id)}, neither number nor text")
            references[image_id] = _reference(by_image[image_id], number) | _looked_for(image, number)
            rows.append({"image": str(coco_image_path(image, folder)), "image_id": image_id})
        except ValueError as error:
            raise ValueError(f"Image {place} of {annotations} cannot be used: {error}; repair it.") from None
    frequencies: list[str] = []
    if any("frequency" in category for category in content["categories"]):
        given = {category["id"]: str(category.get("frequency", "f")) for category in content["categories"]}
        frequencies = [given[category] for category in names]
    return GroundTruth(list(names.values()), references, rows, frequencies, list(names))


def rows_ground_truth(rows: Iterable[Mapping[str, Any]], labels: Sequence[str]) -> GroundTruth:
    """The truth of rows as the readers in `data` give them.

    Args:
        rows: Each with "boxes" (M, 4) xyxy in pixels and "names" (M), optionally "image_id" (its place by default),
            "crowd" and "area".
        labels: The names.

    Returns:
        The truth; a box whose name is not among the labels is left out.
    """
    place = {name_key(label): number for number, label in reversed(list(enumerate(labels)))}
    references = {}
    for index, row in enumerate(_without_pictures(rows)):
        names = [name_key(str(name)) for name in row["names"]]
        keep = np.array([name in place for name in names], dtype=bool)
        boxes = np.asarray(row["boxes"], dtype=np.float64).reshape(-1, 4)
        crowd, area = row.get("crowd"), row.get("area")
        crowd = np.zeros(len(boxes), dtype=bool) if crowd is None else np.asarray(crowd, dtype=bool)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) if area is None else np.asarray(area, dtype=np.float64)
        references[row.get("image_id", index)] = {
            "boxes": boxes[keep],
            "labels": np.array([place[name] for name in names if name in place], dtype=np.int64),
            "crowd": crowd[keep],
            "area": area[keep],
        }
    return GroundTruth(list(labels), references, rows)


def _without_pictures(rows: Any) -> Any:
    """The rows without decoding a photograph, where they know how."""
    return rows.remove_columns("image") if hasattr(rows, "remove_columns") else rows


def _reference(annotations: Sequence[Mapping[str, Any]], number: Mapping[Any, int]) -> dict[str, Any]:
    boxes, labels, crowd, areas = [], [], [], []
    for annotation in annotations:
        category, area = annotation.get("category_id"), annotation.get("area")
        try:
            boxes.append(parse_box(annotation.get("bbox"), "xywh"))
            if not isinstance(category, (int, float)) or category not in number:
                raise ValueError(f"category_id {shorten(category)} is not among the file's categories")
            if area is not None and not (isinstance(area, (int, float)) and math.isfinite(area)):
                raise ValueError(f"the area {shorten(area)} is not a finite number")
        except ValueError as error:
            raise ValueError(f"in annotation {shorten(annotation.get('id'))}, {error}") from None
        labels.append(number[category])
        crowd.append(bool(annotation.get("iscrowd", 0)))
        areas.append(annotation["bbox"][2] * annotation["bbox"][3] if area is None else area)
    return {
        "boxes": np.array(boxes, dtype=np.float64).reshape(-1, 4),
        "labels": np.array(labels, dtype=np.int64),
        "crowd": np.array(crowd, dtype=bool),
        "area": np.array(areas, dtype=np.float64),
    }


def _looked_for(image: Mapping[str, Any], number: Mapping[Any, int]) -> dict[str, list[int]]:
    """LVIS: which labels are known to be absent, and of which not every object is annotated."""
    if "neg_category_ids" not in image:
        return {}
    # A cut of the data set may have left out some of the categories.
    return {
        name: [number[category] for category in image.get(key) or () if category in number]
        for name, key in (
            ("negative_labels", "neg_category_ids"),
            ("not_exhaustive_labels", "not_exhaustive_category_ids"),
        )
    }
