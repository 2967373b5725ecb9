"""Masks of the pictures of a shard: on a CPU, several pictures side by side and one thread for each.

A segmenter rounds differently with another number of threads, which moves single pixels at the edges of masks. With one
thread for each picture, masks depend on the picture alone, however many threads, workers or machines there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..detection.detections import Detections
from ..detection.prepared_pictures import PreparedPicture
from ..inference.workers import only_blocks, run_blocks
from ..segmentation import Segmenter
from .label_settings import LabelJob
from .shard_files import LabelRow

Found = tuple[int, PreparedPicture, Detections]
"""A picture's place in its shard, the picture, and its detections."""

# Pictures at a time on a CPU: the features of each take up to a gigabyte with the largest segmenters.
_MOST_LANES = 4


class ShardMasks:
    """Makes the masks of what was found in pictures.

    Args:
        segmenter: The model, which stays on its device.
        failed: Function that returns the row of a picture whose masks cannot be made, from its name and the error; it
            raises the error if no further picture can have masks in this process.
    """

    def __init__(self, segmenter: Segmenter, failed: Callable[[str, Exception], LabelRow]) -> None:
        self._segmenter, self._failed = segmenter, failed
        self._is_on_cpu = segmenter.device.type == "cpu"

    @property
    def at_once(self) -> int:
        """Number of pictures that should be handed over at a time."""
        return _MOST_LANES if self._is_on_cpu else 1

    def rows(self, found: Sequence[Found]) -> list[tuple[int, LabelRow]]:
        """Return the row of each picture with its masks, beside the picture's place in the shard.

        Args:
            found: Up to `at_once` pictures.
        """
        rows: dict[int, LabelRow] = {}

        def make(number: int) -> None:
            place, picture, detections = found[number]
            try:
                rows[place] = LabelRow.of(picture.source, self._segmenter(picture.image, detections))
            except Exception as error:
                rows[place] = self._failed(picture.source, error)

        if self._is_on_cpu:
            with only_blocks():
                run_blocks(make, len(found))
        else:
            for number in range(len(found)):
                make(number)
        return [(place, rows[place]) for place, _, _ in found]


def job_segmenter(job: LabelJob, device: str) -> Segmenter | None:
    """Load the segmenter of a job; None if it has none.

    Args:
        job: How pictures are labelled.
        device: Where it computes.

    Raises:
        ValueError: The segmenter, the device or the dtype cannot be used.
    """
    if job.segmenter is None:
        return None
    # Only the detector computes with 8-bit integers.
    return Segmenter(job.segmenter, device, "float32" if job.dtype == "int8" else job.dtype, tighten=job.tighten)
