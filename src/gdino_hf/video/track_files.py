"""Files of tracks: JSON lines, MOT Challenge, a table with a line for each track, and COCO-VID."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import IO, Any

from ..detection.coco_exchange import encode_masks, mask_area
from ..whole_files import whole_file, write_whole_text
from .tracked_frames import TrackedFrame

FRAMES, MOT, TABLE, COCO = "frames.jsonl", "tracks.txt", "tracks.csv", "tracks.coco.json"


@dataclass
class TrackRow:
    """One track so far.

    Attributes:
        track_id: Its number, from 1.
        label: What it is.
        first, last: Index of its first and last frame, from 0.
        first_seconds, last_seconds: Their times.
        frames: Number of frames it is in.
        score_sum: Sum of its scores.
    """

    track_id: int
    label: str
    first: int
    last: int
    first_seconds: float
    last_seconds: float
    frames: int = 0
    score_sum: float = 0.0

    @property
    def mean_score(self) -> float:
        """Mean of its scores, 0..1."""
        return self.score_sum / self.frames


class TrackFiles:
    """Writes the tracks of a video while it runs, in memory that does not grow with the video.

    `frames.jsonl` and `tracks.txt` grow line by line and are whole after every frame. `finish` writes the others.

    Args:
        folder: Folder to write in.
        video: Name of the video, for COCO-VID.
        names: All labels; in MOT and COCO-VID they are counted from 1.
        rate: Frames per second.

    Raises:
        OSError: A file cannot be written.
    """

    def __init__(self, folder: Path, video: str, names: tuple[str, ...], rate: float) -> None:
        self.folder, self.names = folder, names
        self._video, self._rate = video, rate
        self.tracks: dict[int, TrackRow] = {}
        self.frames = 0
        self._lines: IO[str] = open(folder / FRAMES, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        self._mot: IO[str] = open(folder / MOT, "w", encoding="ascii")  # noqa: SIM115

    def add(self, frame: TrackedFrame) -> None:
        """Write what is in a frame.

        Raises:
            ImportError: There are masks, but pycocotools is not installed.
            OSError: A file cannot be written.
        """
        found = frame.found
        assert found.track_ids is not None
        self.frames += 1
        ids = found.track_ids.tolist()
        detections: list[dict[str, Any]] = []
        masks = encode_masks(found.masks)
        for place, (each, number) in enumerate(zip(found, ids, strict=True)):
            box = [round(side, 2) for side in each.box]
            detections.append(
                {
                    "track_id": number,
                    "label": each.text_label,
                    "label_index": each.label,
                    "score": round(each.score, 4),
                    "box": box,
                }
                | ({} if masks is None else {"mask": masks[place]})
            )
            row = self.tracks.get(number)
            if row is None:
                at = (frame.number, frame.number, frame.seconds, frame.seconds)
                row = self.tracks[number] = TrackRow(number, each.text_label, *at)
            row.last, row.last_seconds = frame.number, frame.seconds
            row.frames, row.score_sum = row.frames + 1, row.score_sum + each.score
            self._mot.write(_mot_line(frame.number, number, box, each.score, each.label))
        line = {
            "frame": frame.number,
            "seconds": round(frame.seconds, 6),
            "width": found.size[0],
            "height": found.size[1],
            "detected": frame.detected,
            "detections": detections,
        }
        self._lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        # Both files are whole if the process is killed after this frame.
        self._lines.flush()
        self._mot.flush()

    def finish(self) -> None:
        """Close the files that grew, and write the table and COCO-VID.

        Raises:
            OSError: A file cannot be written.
        """
        self._lines.close()
        self._mot.close()
        write_whole_text(self.folder / TABLE, self.table())
        with whole_file(self.folder / COCO) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            for part in self._coco():
                file.write(part)

    def table(self) -> str:
        """Return the tracks as CSV, in the order of their ids."""
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            ["track_id", "label", "first_frame", "last_frame", "first_seconds", "last_seconds", "frames", "mean_score"]
        )
        for row in sorted(self.tracks.values(), key=lambda row: row.track_id):
            seconds = f"{row.first_seconds:.3f}", f"{row.last_seconds:.3f}"
            writer.writerow(
                [row.track_id, row.label, row.first, row.last, *seconds, row.frames, f"{row.mean_score:.4f}"]
            )
        return text.getvalue()

    def _coco(self) -> Iterator[str]:
        """Yield the parts of the COCO-VID file, read back from the JSON lines."""
        numbers = {name: number for number, name in enumerate(self.names, start=1)}
        size = next(((row["width"], row["height"]) for row in self._rows()), (0, 0))
        head = {
            "videos": [{"id": 1, "name": self._video, "width": size[0], "height": size[1], "fps": self._rate}],
            "categories": [{"id": number, "name": name} for name, number in numbers.items()],
            "tracks": [
                {"id": row.track_id, "category_id": numbers[row.label], "video_id": 1} for row in self.tracks.values()
            ],
        }
        yield json.dumps(head)[:-1]
        yield ', "images": ['
        for place, row in enumerate(self._rows()):
            yield ", " * bool(place) + json.dumps(self._image(row, place + 1))
        yield '], "annotations": ['
        count = 0
        for place, row in enumerate(self._rows(), start=1):
            for found in row["detections"]:
                yield ", " * bool(count)
                count += 1
                yield json.dumps(_annotation(found, count, place, numbers))
        yield "]}\n"

    def _rows(self) -> Iterator[dict[str, Any]]:
        with open(self.folder / FRAMES, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    def _image(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        return {
            "id": number,
            "video_id": 1,
            "frame_id": row["frame"],
            "file_name": f"{self._video}/{row['frame']:06}.jpg",
            "width": row["width"],
            "height": row["height"],
            "seconds": row["seconds"],
        }


def _mot_line(frame: int, track: int, box: list[float], score: float, label: int) -> str:
    """Return a line of MOT Challenge: frames, ids, pixels and classes are counted from 1."""
    left, top, right, bottom = box
    numbers = (left + 1, top + 1, right - left, bottom - top)
    return f"{frame + 1},{track},{','.join(f'{number:.2f}' for number in numbers)},{score:.4f},{label + 1},-1,-1\n"


def _annotation(found: dict[str, Any], number: int, image: int, categories: dict[str, int]) -> dict[str, Any]:
    left, top, right, bottom = found["box"]
    width, height = round(right - left, 2), round(bottom - top, 2)
    row = {
        "id": number,
        "image_id": image,
        "video_id": 1,
        "category_id": categories[found["label"]],
        "track_id": found["track_id"],
        "instance_id": found["track_id"],
        "bbox": [left, top, width, height],
        "area": round(width * height, 2),
        "iscrowd": 0,
        "score": found["score"],
    }
    if "mask" in found:
        row |= {"segmentation": found["mask"], "area": mask_area(found["mask"])}
    return row
