"""What the pipeline may be called with: a picture, or a list, data set or generator of pictures, with labels."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from .tensor_values import is_picture
from .text_prompt import as_sequence

_LABELS = ("candidate_labels", "text_queries")


def pipeline_inputs(image: Any, labels: Any) -> Any:
    """Return a call's pictures as mappings with "image" and "candidate_labels".

    Args:
        image: A picture, a mapping with "image" and optionally "candidate_labels" or "text_queries", or a list, 4-D
            array, data set, table or generator of either.
        labels: Labels for all pictures that have none of their own, as a list or text; or one such value per picture
            of a list. None if every picture has its own.

    Returns:
        A mapping for one picture, a list for a list, a data set for a data set, and a generator for anything else.

    Raises:
        TypeError: The input has another type.
        ValueError: A picture has no labels or labels twice, or the numbers of pictures and lists of labels differ.
    """
    labels = as_sequence(labels)
    if hasattr(image, "iloc") and getattr(image, "ndim", 1) == 2:
        # A table has one picture in each row.
        image = image.to_dict("records")
    per_picture = isinstance(labels, Sequence) and any(not isinstance(label, str) for label in labels)
    if isinstance(image, np.ndarray) and image.dtype.kind in "OSU":
        if image.ndim > 1:
            raise TypeError(
                f"The pipeline takes an array of numbers as a picture, or a list of pictures, got an array of "
                f"{image.dtype} of the shape {image.shape}; convert it by astype('uint8')."
            )
        image = image.tolist()
    if is_picture(image) or isinstance(image, Mapping):
        if per_picture and len(labels) == 1:
            labels = labels[0]
        return _row(image, labels)
    # Columns of tables count by place, not by their index.
    if isinstance(image, (np.ndarray, Tensor)) or hasattr(image, "iloc"):
        image = list(image)
    if isinstance(image, (list, tuple)):
        if per_picture and len(labels) != len(image):
            raise ValueError(f"There are labels for {len(labels)} pictures but {len(image)} pictures; give one each.")
        return [_row(item, labels[place] if per_picture else labels) for place, item in enumerate(image)]
    if per_picture:
        raise ValueError("Labels for single pictures need a list of pictures; give one list of labels for all.")
    if hasattr(image, "__getitem__") and hasattr(image, "__len__"):
        return _Rows(image, labels)
    if isinstance(image, (Iterable, Dataset)):
        return _generated(image, labels)
    raise TypeError(
        f"The pipeline takes a picture, or a list, data set or generator of pictures, got {type(image).__name__}."
    )


class _Rows(Dataset):
    """A data set of pictures or mappings, read element by element."""

    def __init__(self, source: Any, labels: Any) -> None:
        self.source, self.labels = source, labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self.source):
            raise IndexError(index)
        return _row(self.source[index], self.labels)


def _generated(source: Any, labels: Any) -> Iterator[dict[str, Any]]:
    for item in source:
        yield _row(item, labels)


def _row(item: Any, labels: Any) -> dict[str, Any]:
    """Return one picture and its labels; the picture's own labels come before those of the call."""
    image, own = item, None
    if isinstance(item, Mapping):
        image = item if "image" not in item and item.get("bytes") is not None else item.get("image")
        if image is None:
            raise ValueError(f"A mapping must have 'image', got {', '.join(map(str, item)) or 'nothing'}.")
        given = [item[name] for name in _LABELS if item.get(name) is not None]
        if len(given) == 2 and given[0] != given[1]:
            raise ValueError("A picture has candidate_labels and text_queries that differ; give candidate_labels only.")
        own = given[0] if given else None
    if isinstance(image, Mapping):
        # A picture of a data set that was not decoded.
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    labels = labels if own is None else own
    if labels is None:
        raise ValueError("A picture has no labels; pass candidate_labels=['cat', 'remote control'] or give it its own.")
    return {"image": image, "candidate_labels": labels}
