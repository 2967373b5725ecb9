"""What there is to find: per image the true boxes in the form the metrics take."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..data.negatives import name_key


@dataclass(frozen=True)
class Truth:
    """The truth of a data set.

    Attributes:
        labels: What the numbers in references mean, and the prompt.
        references: By image id: "boxes" (M, 4) xyxy in pixels, "labels" (M,), "crowd" (M,), "area" (M,); of LVIS also
            "negative_labels" and "not_exhaustive_labels" (lists of numbers).
        rows: What `predict` takes: "image" and "image_id" each.
        frequencies: Of LVIS, "r", "c" or "f" per label: rare, common, frequent.
    """

    labels: list[str]
    references: dict[Any, dict[str, Any]]
    rows: Any
    frequencies: list[str] = field(default_factory=list)

    @property
    def is_federated(self) -> bool:
        """Whether only some labels were looked for in each image, as in LVIS."""
        return any("negative_labels" in reference for reference in self.references.values())

    def of(self, predictions: Iterable[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[dict[str, Any]]]:
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
        order = sorted(by_image)
        return [by_image[image] for image in order], [self.references[image] for image in order]

    def only(self, labels: Sequence[str]) -> Truth:
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
        return Truth(
            labels=list(labels),
            references={image: kept(reference) for image, reference in self.references.items()},
            rows=self.rows,
            frequencies=[frequency.get(label, "f") for label in range(len(labels))] if self.frequencies else [],
        )


def coco_truth(annotations: str | Path, images: str | Path | None = None) -> Truth:
    """The truth of a COCO or LVIS file, to the last digit: boxes neither clipped nor rounded, areas as annotated.

    Photographs are not looked for: one that is missing fails where it is read, by its name.

    Args:
        annotations: The json, boxes as absolute xywh.
        images: Folder of the photographs; the folder `images` beside the json by default.

    Returns:
        The truth, labels in the order of their ids.

    Raises:
        ValueError: It is not a COCO detection file.
    """
    content = _load(annotations)
    folder = Path(images) if images is not None else Path(annotations).parent / "images"
    try:
        categories = sorted(content["categories"], key=lambda category: category["id"])
        number = {category["id"]: place for place, category in enumerate(categories)}
        found: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            if annotation["image_id"] in found:
                found[annotation["image_id"]].append(annotation)
        references = {
            image["id"]: _reference(found[image["id"]], number) | _looked_for(image, number)
            for image in content["images"]
        }
        rows = [{"image": str(_photograph(image, folder)), "image_id": image["id"]} for image in content["images"]]
        names = [str(category["name"]) for category in categories]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{annotations} is not a COCO detection file ({reason}).") from error
    frequencies = [str(category.get("frequency", "f")) for category in categories]
    return Truth(names, references, rows, frequencies if any("frequency" in item for item in categories) else [])


def rows_truth(rows: Iterable[Mapping[str, Any]], labels: Sequence[str]) -> Truth:
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
    return Truth(list(labels), references, rows)


def _without_pictures(rows: Any) -> Any:
    """The rows without decoding a photograph, where they know how."""
    return rows.remove_columns("image") if hasattr(rows, "remove_columns") else rows


def _load(annotations: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(annotations).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{annotations} cannot be read as COCO json ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{annotations} is not a COCO detection file: it holds a {type(content).__name__}.")
    missing = {"images", "annotations", "categories"} - content.keys()
    if missing:
        raise ValueError(f"{annotations} is not a COCO detection file: it has no {', '.join(sorted(missing))}.")
    return content


def _reference(annotations: Sequence[Mapping[str, Any]], number: Mapping[int, int]) -> dict[str, Any]:
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    areas = [annotation.get("area", box[2] * box[3]) for annotation, box in zip(annotations, boxes, strict=True)]
    unknown = [annotation for annotation in annotations if annotation["category_id"] not in number]
    if unknown:
        raise ValueError(
            f"annotation {unknown[0].get('id')} has category_id {unknown[0]['category_id']}, which is not among its "
            "categories"
        )
    return {
        "boxes": np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
        "labels": np.array([number[annotation["category_id"]] for annotation in annotations], dtype=np.int64),
        "crowd": np.array([bool(annotation.get("iscrowd", 0)) for annotation in annotations], dtype=bool),
        "area": np.array(areas, dtype=np.float64),
    }


def _looked_for(image: Mapping[str, Any], number: Mapping[int, int]) -> dict[str, list[int]]:
    """LVIS: which labels are known to be absent, and of which not every object is annotated."""
    if "neg_category_ids" not in image:
        return {}
    return {
        "negative_labels": [number[category] for category in image["neg_category_ids"]],
        "not_exhaustive_labels": [number[category] for category in image.get("not_exhaustive_category_ids", ())],
    }


def _photograph(image: Mapping[str, Any], folder: Path) -> Path:
    """Where an image's file should be; LVIS gives an address, of which the last parts are COCO's folder and name."""
    if "file_name" in image:
        return folder / image["file_name"]
    address = PurePosixPath(image["coco_url"])
    with_split = folder / address.parent.name / address.name
    return with_split if with_split.exists() else folder / address.name
