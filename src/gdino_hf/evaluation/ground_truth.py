"""Ground truth of a data set: the true boxes of each image in the format of the metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..data.annotation_options import DEFAULT_OPTIONS, AnnotationOptions
from ..data.coco import reader_findings
from ..data.coco_content import id_key
from ..data.coco_file import CocoFile, CocoImage
from ..data.stored_pictures import row_picture
from ..model.text_prompt import name_key


@dataclass(frozen=True)
class GroundTruth:
    """Ground truth of a data set.

    Attributes:
        labels: Names of the label numbers in `references`, which are also the labels to detect.
        references: By image id, a dict with "boxes" (M, 4) xyxy in pixels, "labels" (M,), "crowd" (M,) and "area" (M,);
            for LVIS and files with "neg_names" also "negative_labels" and "not_exhaustive_labels" (lists of label
            numbers).
        rows: Rows for `predict`, each with "image" and "image_id".
        frequencies: "r" (rare), "c" (common) or "f" (frequent) for each label of LVIS; empty for other data sets.
        category_ids: Category id of each label of a COCO file; empty for other data sets. Of several ids with one name
            it is the first.
        label_of: Label number of each category id of a COCO file, in the form of `id_key`; empty for other data sets.
        sizes: Width and height in pixels of the upright pictures that the boxes are in, by image id, as far as known.
    """

    labels: list[str]
    references: dict[Any, dict[str, Any]]
    rows: Any
    frequencies: list[str] = field(default_factory=list)
    category_ids: list[Any] = field(default_factory=list)
    label_of: dict[int | str, int] = field(default_factory=dict)
    sizes: dict[Any, tuple[int, int]] = field(default_factory=dict)

    @property
    def is_federated(self) -> bool:
        """Whether each image is annotated for only some of the labels, as in LVIS."""
        return any("negative_labels" in reference for reference in self.references.values())

    @property
    def has_captions(self) -> bool:
        """Whether the boxes are annotated with phrases of captions instead of labels."""
        return any("phrases" in reference for reference in self.references.values())

    @property
    def protocol(self) -> Literal["coco", "lvis", "phrases"]:
        """The metrics that the annotations are made for: fixed AP where images are annotated for some labels only."""
        return "phrases" if self.has_captions else "lvis" if self.is_federated else "coco"

    def paired_with(
        self, predictions: Iterable[Mapping[str, Any]]
    ) -> tuple[list[Mapping[str, Any]], list[dict[str, Any]]]:
        """Pair predictions with the references of the same images, in the order of image ids.

        Args:
            predictions: Dicts with "image_id". Images without a prediction are left out.

        Returns:
            Predictions and references, equally many.

        Raises:
            ValueError: A prediction is of an image that the data set does not have, or of a picture of another size.
        """
        by_image = {self.find_image(prediction["image_id"]): prediction for prediction in predictions}
        unknown = [image for image in by_image if image not in self.references]
        if unknown:
            raise ValueError(
                f"The predictions are of image {unknown[0]!r}, which the data set does not have; give the data set "
                "they were made on."
            )
        self._check_sizes(by_image)
        # Some files mix numbers and text as ids; numbers come first.
        order = sorted(by_image, key=lambda image: (isinstance(image, str), image))
        return [by_image[image] for image in order], [self.references[image] for image in order]

    def _check_sizes(self, by_image: Mapping[Any, Mapping[str, Any]]) -> None:
        """Check that the predictions' pictures have the sizes that the boxes are in."""
        differing = []
        for image, prediction in by_image.items():
            own, true = (prediction.get("width"), prediction.get("height")), self.sizes.get(image)
            if true is not None and None not in own and own != true:
                differing.append(f"image {image!r} is {own[0]}x{own[1]} there and {true[0]}x{true[1]} here")
        if differing:
            raise ValueError(
                f"The predictions of {len(differing)} images are of pictures of other sizes than the boxes "
                f"({differing[0]}), which happens where EXIF turns a picture whose file is not here to tell; name the "
                "folder of the pictures (--images)."
            )

    def find_image(self, image_id: Any) -> Any:
        """Return an image id as `references` has it, where 7 and "7" are the same; as it is if there is none."""
        if image_id in self.references:
            return image_id
        return self._images_by_key.get(id_key(image_id), image_id)

    @cached_property
    def _images_by_key(self) -> dict[int | str, Any]:
        return {id_key(image): image for image in self.references}

    def restricted_to(self, labels: Sequence[str]) -> GroundTruth:
        """Return the ground truth of some labels, as if the others had not been annotated.

        Args:
            labels: Names in the order of their new numbers. A name that the data set lacks has no boxes.
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
            sizes=self.sizes,
        )


def coco_ground_truth(
    annotations: str | Path,
    images: str | Path | None = None,
    options: AnnotationOptions = DEFAULT_OPTIONS,
    log: bool = True,
) -> GroundTruth:
    """Read the exact ground truth of a COCO or LVIS file: boxes are not clipped or rounded, areas are as annotated.

    Image files need not exist; a missing one is reported when it is read. Those that exist are compared with their
    annotated size, and boxes in pixels of the stored picture are turned upright with it.

    Args:
        annotations: The json file; its boxes are absolute xywh.
        images: Folder of the images; found as `read_coco` finds it by default.
        options: Conventions of the file.
        log: Whether to log what was turned, scaled or left out.

    Returns:
        The ground truth, with distinct labels in the order of their category ids.

    Raises:
        ValueError: The file is not a COCO detection file, or holds something that cannot be used.
    """
    findings = reader_findings(annotations, options)
    file = CocoFile(annotations, images, options, findings)
    references: dict[Any, dict[str, Any]] = {}
    rows = []
    sizes: dict[Any, tuple[int, int]] = {}
    for image in file.images(need_files=False):
        image_id = image.entry["id"] if isinstance(image.entry["id"], str) else image.id
        references[image_id] = _reference(image, file) | _lvis_labels(image, file)
        rows.append({"image": row_picture(image.path), "image_id": image_id})
        if image.size is not None:
            sizes[image_id] = image.size
    if log:
        findings.log()
    category_ids: list[Any] = [None] * len(file.labels)
    for category, label in reversed(file.label_of.items()):
        category_ids[label] = file.ids[category]
    frequencies: list[str] = []
    if any("frequency" in category for category in file.content.categories):
        given = {id_key(entry.get("id")): str(entry.get("frequency", "f")) for entry in file.content.categories}
        frequencies = [given[id_key(category)] for category in category_ids]
    return GroundTruth(file.labels, references, rows, frequencies, category_ids, file.label_of, sizes)


def rows_ground_truth(rows: Iterable[Mapping[str, Any]], labels: Sequence[str]) -> GroundTruth:
    """Collect the ground truth of rows from the readers in `data`.

    Args:
        rows: Rows with "boxes" ((M, 4) xyxy in pixels), "names" (M) and optionally "image_id" (default: the row's
            index), "crowd", "area" and "neg_names" (names that are known to be absent from the image).
        labels: Names in the order of their numbers.

    Returns:
        The ground truth. Boxes whose name is not among the labels are left out.
    """
    place = {name_key(label): number for number, label in reversed(list(enumerate(labels)))}
    references = {}
    rows_without_images = list(_without_images(rows))
    is_federated = any(row.get("neg_names") is not None for row in rows_without_images)
    for index, row in enumerate(rows_without_images):
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
        if is_federated:
            absent = row.get("neg_names")
            # An image that does not say which names are absent has all of them annotated.
            known = place if absent is None else map(name_key, absent)
            negative = [place[name] for name in known if name in place and name not in names]
            references[row.get("image_id", index)] |= {"negative_labels": negative, "not_exhaustive_labels": []}
    return GroundTruth(list(labels), references, rows)


def _without_images(rows: Any) -> Any:
    """Return the rows without their images, which saves decoding them, if the type of rows supports it."""
    return rows.remove_columns("image") if hasattr(rows, "remove_columns") else rows


def _reference(image: CocoImage, file: CocoFile) -> dict[str, Any]:
    return {
        "boxes": np.array(image.boxes, dtype=np.float64).reshape(-1, 4),
        "labels": np.array([file.label_of[category] for category in image.categories], dtype=np.int64),
        "crowd": np.array(image.crowd, dtype=bool),
        "area": np.array(image.areas, dtype=np.float64),
    }


def _lvis_labels(image: CocoImage, file: CocoFile) -> dict[str, list[int]]:
    """Return the labels that are known to be absent from an image, and those not annotated exhaustively in it."""
    if not file.has_absent_names:
        return {}
    listed, partly = (
        _known_labels(image.entry.get(key), file) for key in ("neg_category_ids", "not_exhaustive_category_ids")
    )
    named = [file.label_places[key] for key in map(name_key, image.absent or ()) if key in file.label_places]
    negative = list(dict.fromkeys([*listed, *named]))
    if image.absent is None and not file.is_lvis:
        # An image that does not say which names are absent has all of them annotated.
        here = {file.label_of[category] for category in image.categories}
        negative = [label for label in file.label_places.values() if label not in here]
    return {"negative_labels": negative, "not_exhaustive_labels": partly}


def _known_labels(ids: Any, file: CocoFile) -> list[int]:
    """Return the labels of category ids; a subset of LVIS may lack some, and anything but a list was reported."""
    found = [file.label_of.get(id_key(category)) for category in (ids if isinstance(ids, list) else [])]
    return [label for label in found if label is not None]
