"""Files to download: the formats of `gdino detect --format`, JSON, and annotated pictures."""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from gdino_hf import Detections
from gdino_hf.detection.dataset_files import FORMATS, DataSetFiles

from .safety import Refused

FORMAT_NAMES = tuple(FORMATS)


def format_file(name: str, results: Iterable[Detections]) -> tuple[str, bytes]:
    """Write detections in a format of another tool.

    Args:
        name: One of `FORMAT_NAMES`.
        results: Detections of one picture or more, all of the same labels, which are taken one by one.

    Returns:
        File name and content; a ZIP archive if the format has several files.

    Raises:
        Refused: There is no such format, there is nothing to write, or a library is missing.
    """
    if name not in FORMATS:
        raise Refused(f"There is no format of this name here; choose one of {', '.join(FORMATS)}.")
    remaining = iter(results)
    first = next(remaining, None)
    if first is None:
        raise Refused("There is nothing to write; no picture could be read.")
    with tempfile.TemporaryDirectory(prefix="gdino-format-") as folder:
        try:
            with DataSetFiles(folder, [name], first.names) as files:
                for found in chain([first], remaining):
                    files.add(found)
        except ImportError as error:
            raise Refused(str(error)) from error
        written = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        if len(written) == 1:
            return written[0].name, written[0].read_bytes()
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as together:
            for path in written:
                together.write(path, path.relative_to(folder).as_posix())
        return f"{name}.zip", archive.getvalue()


def coco_data(results: Iterable[Detections]) -> dict[str, Any]:
    """Return detections as the content of a COCO data set.

    Args:
        results: Detections of any number of pictures, all of the same labels; an empty list for none.

    Returns:
        "images", "categories" numbered from 1 in the order of the labels, and "annotations" with scores and with xywh
        boxes in pixels.
    """
    if not results:
        return {"images": [], "categories": [], "annotations": []}
    data: dict[str, Any] = json.loads(format_file("coco", results)[1])
    return data


def png(image: Any, found: Detections) -> bytes:
    """Draw detections into the picture they were found in, and encode it as PNG."""
    buffer = io.BytesIO()
    found.plot(image).save(buffer, "PNG")
    return buffer.getvalue()
