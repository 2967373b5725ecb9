"""Lines and zones against counts by hand."""

import pytest

from gdino_hf import Detections
from gdino_hf.video.counting import Counts

NAMES = ("cat", "dog")


def at(*centers, size=(200, 100)):
    """Boxes of ten pixels: (center x, track id, label)."""
    boxes = [[x - 5, 40, x + 5, 50] for x, _, _ in centers]
    ids, labels = [number for _, number, _ in centers], [label for _, _, label in centers]
    return Detections(boxes, [0.9] * len(boxes), labels, NAMES, size, track_ids=ids)


def test_crossings_are_counted_in_both_directions_and_by_label():
    counts = Counts([((100, 0), (100, 100))], [], (200, 100))
    for step in range(9):
        # A cat goes right, a dog goes left, and another cat stays.
        counts.add(at((60 + 10 * step, 1, 0), (150 - 10 * step, 2, 1), (30, 3, 0)))
    (line,) = counts.summary()["lines"]
    assert (line["in"], line["out"]) == (1, 1)
    assert {**line["in_by_label"], **line["out_by_label"]} == {"cat": 1, "dog": 1}
    assert counts.now() == ["in 1 out 1"]


def test_zones_count_objects_once_and_the_most_at_a_time():
    counts = Counts([], [((50, 20), (120, 20), (120, 80), (50, 80))], (200, 100))
    for step in range(12):
        counts.add(at((10 + 15 * step, 1, 0), (10 + 15 * (step - 2), 2, 1)) if step > 2 else at((10 + 15 * step, 1, 0)))
    (zone,) = counts.summary()["zones"]
    assert (zone["objects"], zone["most"]) == (2, 2)


@pytest.mark.parametrize(
    ("lines", "zones", "sentence"),
    [
        ([((0, 0), (300, 0))], [], r"300,0 of a line or zone is outside the frames, which have 200 x 100"),
        ([((5, 5), (5, 5))], [], "A line has 1 different points"),
        ([], [((0, 0), (9, 9), (0, 0))], "A zone has 2 different points"),
    ],
)
def test_lines_and_zones_outside_the_frames_are_refused(lines, zones, sentence):
    with pytest.raises(ValueError, match=sentence):
        Counts(lines, zones, (200, 100))
