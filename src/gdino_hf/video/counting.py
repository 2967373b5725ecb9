"""Lines that tracked objects cross and zones that they are in, counted by supervision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..detection.detections import Detections
from ..detection.exchange_values import kept_library

Points = Sequence[tuple[float, float]]


class Counts:
    """Counts of a run.

    Args:
        lines: Lines, each as two (x, y) points in pixels. Seen from its first point to its second, an object goes "in"
            if it crosses to the left and "out" if it crosses to the right; all of its box must be across.
        zones: Polygons, each as three (x, y) points or more in pixels. An object is in a zone if the middle of its
            box's lower edge is.
        size: (width, height) of the frames in pixels.

    Attributes:
        lines, zones: The points that were given.

    Raises:
        ImportError: supervision is not installed.
        ValueError: A point is outside the frames, or there are too few.
    """

    def __init__(self, lines: Sequence[Points], zones: Sequence[Points], size: tuple[int, int]) -> None:
        supervision = kept_library("supervision", "counting needs", "video")
        self.lines, self.zones = [list(line) for line in lines], [list(zone) for zone in zones]
        for points in (*self.lines, *self.zones):
            for x, y in points:
                if not (0 <= x <= size[0] and 0 <= y <= size[1]):
                    raise ValueError(
                        f"The point {x:g},{y:g} of a line or zone is outside the frames, which have {size[0]} x "
                        f"{size[1]} pixels; give points within them."
                    )
        for line in self.lines:
            if len(set(line)) != 2:
                raise ValueError(f"A line has {len(set(line))} different points; give two.")
        for zone in self.zones:
            if len(set(zone)) < 3:
                raise ValueError(f"A zone has {len(set(zone))} different points; give three or more.")
        self._lines = [
            supervision.LineZone(*(supervision.Point(round(x), round(y)) for x, y in line)) for line in self.lines
        ]
        self._zones = [supervision.PolygonZone(np.round(np.array(zone)).astype(np.int64)) for zone in self.zones]
        self._in_zones: list[set[int]] = [set() for _ in self.zones]
        self._names: dict[int, str] = {}
        self._most = [0] * len(self.zones)

    def add(self, found: Detections) -> None:
        """Count what is tracked in a frame."""
        given = found.to_supervision()
        self._names.update(enumerate(found.names))
        for line in self._lines:
            line.trigger(given)
        for place, zone in enumerate(self._zones):
            inside = zone.trigger(given)
            assert found.track_ids is not None
            self._in_zones[place].update(found.track_ids[inside].tolist())
            self._most[place] = max(self._most[place], int(inside.sum()))

    def now(self) -> list[str]:
        """Return the present count of each line and then of each zone, as short texts."""
        lines = [f"in {line.in_count} out {line.out_count}" for line in self._lines]
        return lines + [
            f"{zone.current_count} of {len(seen)}" for zone, seen in zip(self._zones, self._in_zones, strict=True)
        ]

    def summary(self) -> dict[str, list[dict[str, Any]]]:
        """Return all counts.

        Returns:
            "lines" and "zones". A line has its points, "in", "out" and both by label; a zone its points, the number of
            "objects" that were ever in it, and the "most" at a time.
        """
        lines = [
            {
                "points": points,
                "in": line.in_count,
                "out": line.out_count,
                "in_by_label": self._by_label(line.in_count_per_class),
                "out_by_label": self._by_label(line.out_count_per_class),
            }
            for points, line in zip(self.lines, self._lines, strict=True)
        ]
        zones = [
            {"points": points, "objects": len(seen), "most": most}
            for points, seen, most in zip(self.zones, self._in_zones, self._most, strict=True)
        ]
        return {"lines": lines, "zones": zones}

    def _by_label(self, counts: dict[Any, int]) -> dict[str, int]:
        return {self._names[int(label)]: count for label, count in counts.items()}
