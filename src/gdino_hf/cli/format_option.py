"""The option --format of `gdino detect`: data set files in the formats of other tools beside the results."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gdino_hf.error_text import reason
from gdino_hf.model.printable import printable

from .errors import OutputError, UsageError
from .inputs import is_url

# As in gdino_hf.detection.dataset_files.FORMATS, which takes a second to import.
FORMAT_NAMES = (
    "coco",
    "coco-results",
    "coco-polygons",
    "yolo",
    "voc",
    "cvat",
    "labelstudio",
    "createml",
    "labelme",
    "png",
    "odvg",
    "hf",
    "csv",
    "parquet",
)


def add_format(parser: argparse.ArgumentParser) -> None:
    """Declare the option --format."""
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMAT_NAMES,
        metavar="NAME",
        default=[],
        help="also write the results of all images in these formats into DIR, once all are done: "
        f"{', '.join(FORMAT_NAMES)}",
    )


class FormatFiles:
    """Data set files of a whole run.

    They are made from the report when the run is finished, so a run that was stopped loses nothing and writes nothing
    twice.

    Args:
        formats: Names of formats.
        folder: Folder of the files.
        labels: Labels of the run.

    Raises:
        UsageError: A format needs a library that is not installed, or a file cannot be written.
    """

    def __init__(self, formats: Sequence[str], folder: Path, labels: Sequence[str]) -> None:
        self._files: Any = None
        if not formats:
            return
        from gdino_hf.detection.dataset_files import DataSetFiles

        try:
            self._files = DataSetFiles(folder, formats, labels)
        except ImportError as error:
            raise UsageError(f"--format: {reason(error)}") from error
        except OSError as error:
            raise UsageError(
                f"--format: {reason(error, name_file=True)}; choose another --out, or remove what is in the way"
            ) from error

    def write(self, report: dict[str, Any]) -> list[str]:
        """Write the files, each whole or not at all.

        Args:
            report: The report of a finished run.

        Returns:
            Lines that tell the user which files there are.

        Raises:
            OutputError: A file cannot be written.
        """
        if self._files is None:
            return []
        root = pictures_folder([entry["image"] for entry in report["images"]])
        try:
            with self._files as files:
                for found in _pictures(report, root):
                    files.add(found)
        except OSError as error:
            raise OutputError(
                f"--format: the data set files cannot be written ({reason(error, name_file=True)}); make room and "
                "repeat the command, which goes on where it stopped"
            ) from error
        lines = [f"{name}: {printable(path)}" for name, path in self._files.paths().items()]
        return lines if root is None else [*lines, f"these files name pictures by their paths inside {printable(root)}"]


def _pictures(report: dict[str, Any], root: Path | None) -> Iterator[Any]:
    """Yield the detections of each image in the report, with its path inside the folder of pictures, or its address."""
    import numpy as np

    from gdino_hf import Detections
    from gdino_hf.detection.coco_exchange import decode_masks

    for entry in report["images"]:
        found, source, size = entry["detections"], entry["image"], (entry["width"], entry["height"])
        yield Detections(
            np.array([item["box"] for item in found], dtype=np.float32),
            np.array([item["score"] for item in found], dtype=np.float32),
            np.array([item["label_index"] for item in found], dtype=np.int64),
            report["labels"],
            size,
            source=source if root is None or is_url(source) else Path(os.path.relpath(source, root)).as_posix(),
            masks=decode_masks([item["mask"] for item in found], size) if "masks" in report else None,
        )


def pictures_folder(sources: Sequence[str]) -> Path | None:
    """Return the folder that holds all pictures, directly or in sub-folders; None if there is none.

    Args:
        sources: Paths and addresses; addresses are passed over.
    """
    folders = {os.path.abspath(Path(source).parent) for source in sources if not is_url(source)}
    try:
        return Path(os.path.commonpath(folders)) if folders else None
    except ValueError:
        # Pictures on several drives.
        return None
