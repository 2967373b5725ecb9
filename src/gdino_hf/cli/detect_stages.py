"""The images of `gdino detect` in overlapping stages: read and prepare, detect, draw and write, and their report.

Two threads read ahead, the model runs in the caller's thread or in the lanes of `Search.in_lanes`, and one thread
draws, writes and reports. An image's result is on disk as soon as it is drawn, also while a later input blocks in its
read.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdino_hf.detection.stages import in_background, in_batches
from gdino_hf.error_text import reason
from gdino_hf.model.printable import printable

from .annotated_files import OutputNames, is_disk_error, save_whole
from .inputs import ImageInput, read_image
from .progress_file import ProgressFile, file_stamp
from .report_file import ReportFile

_READERS = 2
# Images that wait to be written. Each holds a picture in memory, so there are few.
_WAITING = 2


@dataclass
class _Work:
    """An image on its way through the stages.

    Attributes:
        image: The input.
        earlier: Its result from an earlier part of the run.
        error: Reason why it failed.
        stamp: `file_stamp` of the image before it was read.
        picture: The picture, ready for the model and, once it is detected, as a PIL image.
        found: Its detections.
    """

    image: ImageInput
    earlier: dict[str, Any] | None = None
    error: str | None = None
    stamp: list[int] | None = None
    picture: Any = None
    found: Any = None


def detect_all(
    out: Path,
    search: Any,
    images: list[ImageInput],
    earlier: dict[str, dict[str, Any]],
    report: dict[str, Any],
    report_file: ReportFile,
    progress: ProgressFile,
    *,
    batch: int,
    may_pad: bool,
) -> bool:
    """Fill the report image by image, in their order; return False if the user stopped it.

    Args:
        out: Folder of the annotated pictures.
        search: The `gdino_hf.detection.search.Search`; None if there is no image to detect anything in.
        images: All inputs of the run.
        earlier: Results, by source, that an earlier part of the run has left.
        report: Report to fill.
        report_file: File that the report is written to every few seconds.
        progress: File that finished images are added to.
        batch: Most images in one forward pass.
        may_pad: Whether images of like sizes share a batch, padded to one size. Otherwise only small images of equal
            sizes do.

    Raises:
        OSError: The disk is full or cannot be written to.
    """
    from tqdm import tqdm

    read = functools.partial(_read, search, earlier)
    alike = functools.partial(_are_alike, may_pad)
    # While each lane computes a batch, two more are prepared for each.
    ahead = 2 * batch * (1 if search is None else search.lanes)
    names = OutputNames(out, images, [result["annotated"] for result in earlier.values()])
    report_file.write_if_due(report)
    try:
        # disable=None: no bar if stderr is not a terminal
        with (
            tqdm(total=len(images), desc="detect", unit="image", disable=None, leave=False) as bar,
            in_background(_Recorder(names, report, report_file, progress, bar), _WAITING) as record,
            closing(_detected(search, in_batches(read, images, batch, _READERS, ahead, alike))) as batches,
        ):
            for works in batches:
                for work in works:
                    record(work)
    except KeyboardInterrupt:
        return False
    return True


def _read(search: Any, earlier: dict[str, dict[str, Any]], image: ImageInput) -> _Work:
    """Read and prepare one image, unless it is done or cannot be read."""
    work = _Work(image, earlier.get(image.source), image.error)
    if work.error is not None or work.earlier is not None:
        return work
    work.stamp = file_stamp(image.source)
    # In bulk work a broken image of any kind must not stop the others.
    try:
        work.picture = search.prepare(read_image(image.source), image.source)
    except Exception as error:
        work.error = _reason(error)
    return work


def _are_alike(may_pad: bool, batch: list[_Work], work: _Work) -> bool:
    """Return whether an image can join a batch; one without a picture always can."""
    if work.picture is None:
        return True
    # Imported here, because mistakes in the command line are reported without waiting for torch.
    from gdino_hf.detection.prepared_pictures import are_alike, are_small_and_equal

    pictures = [each.picture for each in _pictures(batch)]
    return (are_alike if may_pad else are_small_and_equal)(pictures, work.picture)


def _detected(search: Any, batches: Generator[list[_Work], None, None]) -> Generator[list[_Work], None, None]:
    """Run the model over batches, in several lanes where that is faster, and yield them in their order."""
    if search is None:
        return batches

    def run(works: list[_Work]) -> list[_Work]:
        _detect(search, _pictures(works))
        return works

    return search.in_lanes(run, batches, lambda works: [work.picture for work in _pictures(works)])


def _pictures(works: list[_Work]) -> list[_Work]:
    return [work for work in works if work.picture is not None]


def _detect(search: Any, batch: list[_Work]) -> None:
    """Run the model over the images of a batch; if it fails, over each image by itself."""
    if not batch:
        return
    try:
        found = search([work.picture for work in batch])
    except Exception as error:
        if len(batch) > 1:
            for work in batch:
                _detect(search, [work])
        else:
            batch[0].error = _reason(error)
        return
    for work, result in zip(batch, found, strict=True):
        work.found = result
        # The inputs are larger than the picture, which waits to be drawn.
        work.picture = work.picture.image


class _Recorder:
    """Draws, writes and reports one image after the other.

    Args:
        names: Names of the annotated pictures.
        report: Report to fill.
        report_file: The report's file.
        progress: File that finished images are added to.
        bar: Progress bar.
    """

    def __init__(
        self, names: OutputNames, report: dict[str, Any], report_file: ReportFile, progress: ProgressFile, bar: Any
    ) -> None:
        self.names, self.report, self.report_file, self.progress, self.bar = names, report, report_file, progress, bar
        self.is_new = True

    def __call__(self, work: _Work) -> None:
        """Record one image.

        Raises:
            OSError: The disk is full or cannot be written to.
        """
        if work.earlier is not None:
            self.report["images"].append(work.earlier)
        elif work.error is None:
            work.error = self._write(work)
        if work.error is not None:
            _fail(self.report, work.image, work.error)
        self.bar.update()
        self.report_file.write_if_due(self.report)

    def _write(self, work: _Work) -> str | None:
        """Write an annotated picture and note its result; return the reason if that fails for this picture alone."""
        from gdino_hf.visualize import draw_detections

        try:
            result = _result(work)
            annotated = draw_detections(work.picture, work.found.as_result(), colors=work.found.colors)
        except Exception as error:
            return _reason(error)
        if self.is_new:
            # The next picture is this run's, and so must be the report beside it.
            self.report_file.write(self.report)
            self.is_new = False
        target = self.names(work.image.name)
        try:
            save_whole(annotated, target)
        except Exception as error:
            if is_disk_error(error):
                raise
            return _reason(error)
        result["annotated"] = str(target)
        self.progress.add(result, work.stamp)
        self.report["images"].append(result)
        return None


def _result(work: _Work) -> dict[str, Any]:
    """Return the entry of an image in the report."""
    width, height = work.found.size
    detections = [
        {
            "label": found.text_label,
            "label_index": found.label,
            "score": round(found.score, 4),
            "box": [round(side, 2) for side in found.box],
        }
        for found in work.found
    ]
    if work.found.masks is not None:
        from gdino_hf.detection.coco_exchange import encode_masks

        for item, mask in zip(detections, encode_masks(work.found.masks) or (), strict=True):
            item["mask"] = mask
    if work.found.spans is not None:
        for item, spans, scores in zip(detections, work.found.spans, work.found.token_scores, strict=True):
            item["spans"] = [list(span) for span in spans]
            item["token_scores"] = [[token, round(score, 4)] for token, score in scores]
    return {
        "image": work.image.source,
        "width": width,
        "height": height,
        "presence": {label: round(score, 4) for label, score in work.found.presence.items()},
        "detections": detections,
    }


def _reason(error: Exception) -> str:
    return reason(error, name_file=True, most_lines=3)


def _fail(report: dict[str, Any], image: ImageInput, why: str) -> None:
    """Report a failed input on stderr, in one line, and in the JSON."""
    from tqdm import tqdm

    report["failed"].append({"image": image.source, "error": why})
    tqdm.write(f"gdino detect: {printable(image.source)}: {printable(why)}", file=sys.stderr)
