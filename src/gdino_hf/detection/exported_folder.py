"""What an exported folder holds: its one document, and its files, checked before a runtime sees them. No torch."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.printable import printable
from ..model.selection_options import check_score

DOCUMENT = "gdino_export.json"
FORMAT_VERSION = 1
"""Version of the document that this package reads and writes."""
LIBRARIES = {
    "onnx": ("onnxruntime", "runtime"),
    "openvino": ("openvino", "openvino"),
    "executorch": ("executorch", "executorch"),
    "torch-export": ("torch", "torch"),
}
"""The library that runs each format, and the extra of this package that brings it."""
_AGAIN = "export the model again"
_ROLES = {"whole": {"model"}, "baked": {"model"}, "split": {"text", "image"}}


class ExportError(ValueError):
    """An exported folder, or the library that runs it, cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class BakedPrompt:
    """The labels of a model without a text input.

    Attributes:
        names: The labels.
        input_ids: Tokens of the prompt that was baked in.
        spans: (start, end) tokens of each phrase in it; a label may have several.
    """

    names: tuple[str, ...]
    input_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def span_of_phrase(self) -> dict[tuple[int, ...], tuple[int, int]]:
        """The (start, end) tokens in the baked prompt of each phrase, by the phrase's tokens."""
        return {self.input_ids[start:end]: (start, end) for start, end in self.spans}


@dataclass(frozen=True)
class ExportedFolder:
    """An exported folder.

    Attributes:
        path: The folder.
        format: A key of `LIBRARIES`.
        variant: "whole", "split" or "baked".
        files: The file of each role: "model", or "text" and "image"; also those of weights in a second file.
        digests: SHA-256 of each role's file, as hexadecimal digits.
        least_version: Lowest version of the library that runs it.
        image: Options of the image processor, by name.
        text: "max_text_len", and the ids of tokens: "start_id", "end_id", "unknown_id" and "pad_id".
        labels: The labels that were baked in; None if labels are given with a call.
        graphs: "inputs" and "outputs" of each graph by role, with the shape of each.
        nms_threshold: `nms_threshold` of the model's processor.
    """

    path: Path
    format: str
    variant: str
    files: Mapping[str, Path]
    digests: Mapping[str, str]
    least_version: str
    image: Mapping[str, Any]
    text: Mapping[str, Any]
    labels: BakedPrompt | None
    graphs: Mapping[str, Any]
    nms_threshold: float | None = None

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> ExportedFolder:
        """Read the document of a folder and check its files.

        Args:
            folder: A folder that `gdino export` wrote.

        Raises:
            ExportError: It is none, its document is of another version, or a file is missing or damaged.
        """
        path = Path(folder)
        document = _document(path)
        try:
            labels = document.get("labels")
            found = cls(
                path=path,
                format=str(document["format"]),
                variant=str(document["variant"]),
                files=_checked_files(path, document["files"]),
                digests={role: str(stated["sha256"]) for role, stated in document["files"].items()},
                least_version=str(document.get("runtime", {}).get("least_version", "0")),
                image=dict(document["image"]),
                text=dict(document["text"]),
                labels=None if labels is None else _baked_prompt(labels),
                graphs=dict(document.get("graphs", {})),
                nms_threshold=_iou(document.get("post", {}).get("nms_threshold")),
            )
            _check_settings(found)
            whole = found.format in LIBRARIES and _ROLES[found.variant] <= found.files.keys()
            whole = whole and (found.variant == "baked") == (labels is not None) and "max_text_len" in found.text
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, ExportError):
                raise
            why = f"{type(error).__name__}: {error}"
            raise ExportError(
                f"{printable(path / DOCUMENT)} is damaged ({printable(why, limit=100)}); {_AGAIN}."
            ) from error
        if not whole:
            raise ExportError(f"{printable(path / DOCUMENT)} does not describe a whole export; {_AGAIN}.")
        return found


def _check_settings(found: ExportedFolder) -> None:
    """Raise a KeyError, TypeError or ValueError if settings of pictures or text are missing or of another kind."""
    image = found.image
    for name in ("resample", "rescale_factor", "image_mean", "image_std"):
        for number in image[name] if name.startswith("image_") else [image[name]]:
            float(number)
    if image["do_resize"] and not isinstance(image["size"], dict):
        raise TypeError("the size of pictures is no pair of edges")
    image["do_rescale"], image["do_normalize"]  # a missing one raises
    for name in found.text.keys() & {"max_text_len", "start_id", "end_id", "unknown_id", "pad_id"}:
        int(found.text[name])
    if not any(sign.isdigit() for sign in found.least_version):
        raise ValueError(f"there is no version {found.least_version!r} of a runtime")


def is_export(folder: str | os.PathLike[str]) -> bool:
    """Return whether a path is a folder that `gdino export` wrote."""
    return os.path.isfile(os.path.join(folder, DOCUMENT))


def _document(path: Path) -> dict[str, Any]:
    if not is_export(path):
        why = f"it has no {DOCUMENT}" if path.is_dir() else "it is a file" if path.exists() else "there is none"
        raise ExportError(f"{printable(path)} is not an exported folder ({why}); make one with gdino export.")
    try:
        document = json.loads((path / DOCUMENT).read_text(encoding="utf-8"))
    # A document of a million brackets ends in a RecursionError.
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(
            f"{printable(path / DOCUMENT)} cannot be read ({printable(error, limit=100)}); {_AGAIN}."
        ) from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise ExportError(
            f"{printable(path / DOCUMENT)} has the format version {version!r}, and this gdino-hf reads "
            f"{FORMAT_VERSION}; update gdino-hf, or {_AGAIN}."
        )
    return document


def _iou(stated: Any) -> float | None:
    if stated is None:
        return None
    check_score(stated, "nms_threshold")
    return float(stated)


def _baked_prompt(stated: Mapping[str, Any]) -> BakedPrompt:
    names, owners = [str(name) for name in stated["names"]], stated["label_indices"]
    spans = tuple((int(start), int(end)) for start, end in stated["spans"])
    if len(owners) != len(spans) or set(owners) != set(range(len(names))):
        raise ValueError(f"{len(names)} labels have {len(spans)} spans")
    return BakedPrompt(tuple(names), tuple(map(int, stated["input_ids"])), spans)


def _checked_files(path: Path, files: Mapping[str, Any]) -> dict[str, Path]:
    """Return the path of each role's file after comparing its size and its SHA-256 with the document."""
    found = {}
    for role, stated in files.items():
        file = path / Path(str(stated["name"])).name
        if not file.is_file():
            raise ExportError(f"{printable(file)} is missing; copy the whole folder, or {_AGAIN}.")
        state, expected = file.stat(), int(stated["bytes"])
        if state.st_size != expected:
            raise ExportError(
                f"{printable(file)} has {state.st_size} bytes instead of {expected}; copy it again, or {_AGAIN}."
            )
        try:
            digest = _sha256(file, state.st_ino, state.st_size, state.st_mtime_ns)
        except OSError as error:
            raise ExportError(
                f"{printable(file)} cannot be read ({error.strerror}); give yourself the right to read it."
            ) from error
        if digest != stated["sha256"]:
            raise ExportError(
                f"{printable(file)} is damaged, its SHA-256 is not the one in {DOCUMENT}; copy it again, or {_AGAIN}."
            )
        found[role] = file
    return found


@functools.lru_cache(maxsize=64)
def _sha256(file: Path, *state: int) -> str:
    """Hash a file, once in a process for each state of it: 100 MB take a tenth of a second, loading them half a one."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
