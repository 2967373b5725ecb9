"""What an exported folder holds: its one document, and its files, checked before a runtime sees them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.printable import printable

DOCUMENT = "gdino_export.json"
VERSION = 1
"""Version of the document that this package reads."""
LIBRARIES = {"onnx": ("onnxruntime", "runtime"), "openvino": ("openvino", "openvino")}
"""Formats that run without torch: the library of each, and the extra that brings it."""
_BLOCK = 1 << 20


class ExportError(ValueError):
    """An exported folder, or the library that runs it, cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class BakedLabel:
    """A label of a model without a text input.

    Attributes:
        label: Its text.
        spans: (start, end) tokens of each of its phrases in the prompt that was baked in.
    """

    label: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ExportedFolder:
    """An exported folder.

    Attributes:
        path: The folder.
        format: "onnx" or "openvino".
        variant: "whole", "split" or "baked".
        files: The file of each role: "model", or "text" and "image".
        least_version: Lowest version of the library that runs it.
        image: Options of the image processor, by name.
        text: "max_text_len", and the ids of tokens: "start_id", "end_id", "unknown_id" and "pad_id".
        labels: The labels that were baked in; None if labels are given with a call.
    """

    path: Path
    format: str
    variant: str
    files: Mapping[str, Path]
    least_version: str
    image: Mapping[str, Any]
    text: Mapping[str, Any]
    labels: tuple[BakedLabel, ...] | None

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> ExportedFolder:
        """Read the document of a folder and check its files.

        Args:
            folder: A folder that `gdino export` wrote.

        Raises:
            ExportError: It is none, its format needs torch, or a file is missing or damaged.
        """
        path = Path(folder)
        document = _document(path)
        form, variant = str(document.get("format")), str(document.get("variant"))
        if form not in LIBRARIES:
            raise ExportError(
                f"{printable(path)} holds a model in the format {form!r}, which needs torch; open it with "
                f"gdino_hf.Detector, or export it again with --format {' or '.join(LIBRARIES)}."
            )
        try:
            files = _checked_files(path, document["files"])
            labels = document.get("labels")
            labels = None if labels is None else _baked_labels(labels)
            least = str(document.get("runtime", {}).get("least_version", "0"))
            found = cls(path, form, variant, files, least, dict(document["image"]), dict(document["text"]), labels)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, ExportError):
                raise
            why = f"{type(error).__name__}: {error}"
            raise ExportError(
                f"{printable(path / DOCUMENT)} is damaged ({printable(why, limit=100)}); export the model again."
            ) from error
        roles = {"text", "image"} if variant == "split" else {"model"}
        if not roles <= files.keys() or (variant == "baked") != (labels is not None):
            raise ExportError(f"{printable(path / DOCUMENT)} does not describe a whole export; export the model again.")
        return found


def is_export(folder: str | os.PathLike[str]) -> bool:
    """Return whether a path is a folder that `gdino export` wrote."""
    return os.path.isfile(os.path.join(folder, DOCUMENT))


def _document(path: Path) -> dict[str, Any]:
    if not is_export(path):
        raise ExportError(
            f"{printable(path)} is not an exported folder (it has no {DOCUMENT}); make one with gdino export."
        )
    try:
        document = json.loads((path / DOCUMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{printable(path / DOCUMENT)} cannot be read ({printable(error, limit=100)}); export the model again."
        ) from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != VERSION:
        raise ExportError(
            f"{printable(path / DOCUMENT)} has the format version {version!r}, and this gdino-hf reads {VERSION}; "
            "update gdino-hf, or export the model again."
        )
    return document


def _baked_labels(stated: Mapping[str, Any]) -> tuple[BakedLabel, ...]:
    """Return the labels of the one prompt that a document describes."""
    spans: list[list[tuple[int, int]]] = [[] for _ in stated["names"]]
    for index, (start, end) in zip(stated["label_indices"], stated["spans"], strict=True):
        spans[index].append((int(start), int(end)))
    return tuple(BakedLabel(str(name), tuple(of_one)) for name, of_one in zip(stated["names"], spans, strict=True))


def _checked_files(path: Path, files: Mapping[str, Any]) -> dict[str, Path]:
    """Return the path of each role's file after comparing its size and its SHA-256 with the document."""
    found = {}
    for role, stated in files.items():
        file = path / str(stated["name"])
        if not file.is_file():
            raise ExportError(f"{printable(file)} is missing; copy the whole folder, or export the model again.")
        size, expected = file.stat().st_size, int(stated["bytes"])
        if size != expected:
            raise ExportError(
                f"{printable(file)} has {size} bytes instead of {expected}; copy it again, or export the model again."
            )
        if _sha256(file) != stated["sha256"]:
            raise ExportError(
                f"{printable(file)} is damaged, its SHA-256 is not the one in {DOCUMENT}; copy it again, or export "
                "the model again."
            )
        found[role] = file
    return found


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
