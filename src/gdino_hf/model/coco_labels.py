"""COCO annotations of photographs to the model's labels: class, box, area and sizes of each image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .caption_prompt import phrase_tokens
from .text_prompt import Prompt, name_key


def boxes_from_coco(annotation: Mapping[str, Any], image_size: tuple[int, int]) -> dict[str, Tensor]:
    """Convert COCO annotations of one image to classes and boxes, leaving out crowds and boxes without area.

    Args:
        annotation: {"annotations": [{"bbox": absolute xywh in pixels, "category_id": int, "iscrowd"?}, ...]}.
        image_size: (height, width) of the photograph in pixels.

    Returns:
        "class_labels" (N,) int64 category ids, and "boxes" (N, 4) float32 cxcywh in [0, 1], clipped to the image.

    Raises:
        ValueError: The list "annotations" is missing, or an entry lacks a class or a box of four finite numbers.
    """
    labels = labels_from_coco(annotation, image_size, image_size)
    return {"class_labels": labels["class_labels"], "boxes": labels["boxes"]}


def labels_from_coco(
    annotation: Mapping[str, Any],
    original_size: tuple[int, int],
    resized_size: tuple[int, int],
    *,
    relative: bool = True,
) -> dict[str, Tensor]:
    """Convert COCO annotations of one image to labels with all fields of transformers' own detectors.

    Args:
        annotation: {"annotations": [{"bbox": absolute xywh in pixels, "category_id": int, "area"?, "iscrowd"?}, ...]},
            with an optional "image_id". Crowds and boxes without area are left out.
        original_size: (height, width) in pixels of the upright photograph, which the boxes refer to.
        resized_size: (height, width) in pixels of the resized picture without padding.
        relative: Whether boxes become cxcywh in [0, 1]; if not, they are xyxy in pixels of the resized picture.

    Returns:
        "class_labels" (N,) int64 category ids, "boxes" (N, 4) float32, clipped to the image, "area" (N,) float32 in
        pixels of the resized picture, "iscrowd" (N,) int64 zeros, "orig_size" and "size" (2,) int64 height and width
        of the photograph and of the resized picture; and "image_id" (1,) int64 if the annotation has a whole number.

    Raises:
        ValueError: The list "annotations" is missing, or an entry lacks a class or a box of four finite numbers.
    """
    if not isinstance(annotation, Mapping) or "annotations" not in annotation:
        raise ValueError("An annotation must be a dict with the list 'annotations', as COCO has it.")
    height, width = original_size
    grown = (resized_size[0] / height, resized_size[1] / width)
    boxes, classes, areas = [], [], []
    for item in without_crowds(annotation["annotations"]):
        left, top, right, bottom = corners = _corners(item, original_size)
        if right <= left or bottom <= top:
            continue
        centre = ((left + right) / 2 / width, (top + bottom) / 2 / height)
        scaled = [side * grown[1 - axis % 2] for axis, side in enumerate(corners)]
        boxes.append([*centre, (right - left) / width, (bottom - top) / height] if relative else scaled)
        classes.append(category_id(item))
        areas.append(_area(item, (right - left) * (bottom - top)) * grown[0] * grown[1])
    labels = {
        "class_labels": torch.tensor(classes, dtype=torch.int64),
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "area": torch.tensor(areas, dtype=torch.float32),
        "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
        "orig_size": torch.tensor(original_size, dtype=torch.int64),
        "size": torch.tensor(resized_size, dtype=torch.int64),
    }
    image_id = annotation.get("image_id")
    if isinstance(image_id, (int, np.integer)) and not isinstance(image_id, bool):
        labels["image_id"] = torch.tensor([int(image_id)], dtype=torch.int64)
    return labels


def without_crowds(items: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the annotations of single objects, which the model is trained on."""
    return [item for item in items if not item.get("iscrowd", 0)]


def _corners(item: Mapping[str, Any], image_size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the xyxy corners of an annotated box in pixels, clipped to the image."""
    if item.get("bbox") is None:
        raise ValueError(f"The annotation {dict(item)} has no bbox; give x, y, width, height.")
    box = np.asarray(item["bbox"], dtype=np.float64)
    if box.shape != (4,) or not np.isfinite(box).all():
        raise ValueError(f"The bbox {item['bbox']} is not four finite numbers x, y, width, height; repair it.")
    if box[2] < 0 or box[3] < 0:
        raise ValueError(f"The bbox {item['bbox']} has a negative width or height; give x, y, width, height.")
    height, width = image_size
    left, top = box[0].clip(0, width), box[1].clip(0, height)
    return left, top, (box[0] + box[2]).clip(0, width), (box[1] + box[3]).clip(0, height)


def _area(item: Mapping[str, Any], default: float) -> float:
    """Return the annotated area in pixels, which segments make smaller than the box, or the default without one."""
    area = item.get("area")
    if isinstance(area, bool) or not isinstance(area, (int, float, np.number)) or not 0 <= area < np.inf:
        return default
    return float(area)


def category_id(item: Mapping[str, Any]) -> int:
    """Return the category id of one annotation.

    Args:
        item: A dict with "category_id".

    Returns:
        The id.

    Raises:
        ValueError: It is missing or not a whole number.
    """
    number = item.get("category_id")
    if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
        raise ValueError(f"The category_id {number!r} is not a whole number; give the id of the annotation's class.")
    return int(number)


def label_of_prompt(
    annotation: Mapping[str, Any],
    original_size: tuple[int, int],
    resized_size: tuple[int, int],
    prompt: Prompt,
    names: Mapping[int, str] | None,
    *,
    relative: bool = True,
) -> dict[str, Tensor]:
    """Convert COCO annotations of one image to labels whose classes index the labels of the image's prompt.

    Args:
        annotation: As for `labels_from_coco`; entries may name their class with "label" or "category" instead of
            "category_id", and those of a caption have "tokens_positive".
        original_size: (height, width) of the upright photograph in pixels.
        resized_size: (height, width) in pixels of the resized picture without padding.
        prompt: The image's prompt.
        names: Names of the category ids; None if ids are indices into the prompt's labels.
        relative: As for `labels_from_coco`.

    Returns:
        The fields of `labels_from_coco`, and for a caption "positive_map" (N, tokens) bool.

    Raises:
        ValueError: An annotation cannot be used, or its class is not among the prompt's labels.
    """
    if not isinstance(annotation, Mapping) or "annotations" not in annotation:
        raise ValueError("An annotation must be a dict with the list 'annotations', as COCO has it.")
    items = without_crowds(annotation["annotations"])
    named = _named(items, names, prompt)
    # Boxes without area are dropped; numbering the boxes first shows which ones are left.
    numbered = [{**item, "category_id": number} for number, item in enumerate(items)]
    label = labels_from_coco({**annotation, "annotations": numbered}, original_size, resized_size, relative=relative)
    kept = label["class_labels"].tolist()
    label["class_labels"] = torch.tensor([named[number][0] for number in kept], dtype=torch.int64)
    if prompt.offsets is not None:
        label["positive_map"] = torch.zeros(len(kept), len(prompt.offsets), dtype=torch.bool)
        for row, number in enumerate(kept):
            label["positive_map"][row, named[number][1]] = True
    return label


def category_names(categories: Any) -> dict[int, str] | None:
    """Return {id: name} from COCO's list of categories or from a mapping; None stays None."""
    if categories is None:
        return None
    if isinstance(categories, Mapping):
        return {int(number): str(name) for number, name in categories.items()}
    return {int(category["id"]): str(category["name"]) for category in categories}


def _named(
    items: Sequence[Mapping[str, Any]], names: Mapping[int, str] | None, prompt: Prompt
) -> list[tuple[int, list[int]]]:
    """Return the index of each annotation's label and, for a caption, the tokens of its phrase."""
    if prompt.offsets is not None:
        return [phrase_tokens(prompt, item.get("tokens_positive") or ()) for item in items]
    if any("tokens_positive" in item for item in items):
        raise ValueError("tokens_positive are characters of a caption; give build_caption(text, ...) as the text.")
    positives = prompt.labels[: prompt.num_positives]
    place = {name_key(label): index for index, label in reversed(list(enumerate(positives)))}
    return [(_class_index(item, names, place, prompt), []) for item in items]


def _class_index(
    item: Mapping[str, Any], names: Mapping[int, str] | None, place: dict[str, int], prompt: Prompt
) -> int:
    """Return the index of an annotation's label among the image's labels."""
    name = item.get("label", item.get("category"))
    if not isinstance(name, str):
        if "category_id" not in item:
            raise ValueError("An annotation has neither category_id nor label; name its class.")
        number = category_id(item)
        if names is None:
            if not 0 <= number < prompt.num_positives:
                raise ValueError(
                    f"category_id {number} is not an index of the image's {prompt.num_positives} labels; pass "
                    "categories= with the names of the ids."
                )
            return number
        if number not in names:
            raise ValueError(f"category_id {number} is not among the categories given; add it.")
        name = names[number]
    if name_key(name) not in place:
        if name_key(name) in map(name_key, prompt.labels):
            raise ValueError(f"The annotated class {name!r} is a negative label of the image; move it to text.")
        raise ValueError(f"The annotated class {name!r} is not among the image's labels; add it to text.")
    return place[name_key(name)]
