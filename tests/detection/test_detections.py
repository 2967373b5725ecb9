"""Detections: slicing, filtering, suppression and sorting keep all values of a box together."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gdino_hf import Detections

BOXES = [[10, 10, 30, 40], [12, 12, 30, 40], [50, 5, 90, 20], [-4, 50, 20, 90]]
SIZE = (100, 80)


@pytest.fixture
def found():
    masks = np.zeros((4, 80, 100), dtype=bool)
    masks[np.arange(4), np.arange(4)] = True
    return Detections(
        np.array(BOXES),
        [0.9, 0.8, 0.7, 0.6],
        [0, 0, 1, 2],
        ("cat", "dog", "hat"),
        SIZE,
        presence={"cat": 0.9, "dog": 0.7, "hat": 0.6},
        masks=masks,
        track_ids=[7, 8, 9, 10],
        spans=(((0, 3),), ((0, 3),), ((4, 7),), ((8, 11),)),
        caption="cat dog hat",
    )


def test_boxes_lie_within_the_picture(found):
    assert found.boxes[3].tolist() == [0, 50, 20, 80]


def test_iterating_gives_box_score_and_label(found):
    first = next(iter(found))
    assert first.box == (10, 10, 30, 40)
    assert first.score == pytest.approx(0.9)
    assert (first.label, first.text_label) == (0, "cat")
    assert found.text_labels == ["cat", "cat", "dog", "hat"]


@pytest.mark.parametrize(
    ("chosen", "tracks"),
    [
        (slice(1, 3), [8, 9]),
        ([3, 0], [10, 7]),
        (2, [9]),
        (-1, [10]),
        ([], []),
        (np.array([True, False, False, True]), [7, 10]),
        ([False] * 4, []),
    ],
)
def test_chosen_boxes_keep_all_their_values(found, chosen, tracks):
    part = found[chosen]
    assert part.track_ids.tolist() == tracks
    places = [track - 7 for track in tracks]
    assert part.boxes.tolist() == found.boxes[places].tolist()
    assert part.masks.shape == (len(tracks), 80, 100)
    assert [mask.any(1).argmax() for mask in part.masks] == places
    assert part.spans == tuple(found.spans[place] for place in places)
    assert part.presence == found.presence


def test_filter_combines_its_conditions(found):
    assert found.filter(threshold=0.65).track_ids.tolist() == [7, 8, 9]
    assert found.filter(labels="cat").track_ids.tolist() == [7, 8]
    assert found.filter(labels=["cat", "hat"], threshold=0.85).track_ids.tolist() == [7]
    assert found.filter(min_area=600).track_ids.tolist() == [7, 9, 10]
    with pytest.raises(ValueError, match="'bird' was not asked for; the labels are cat, dog, hat"):
        found.filter(labels="bird")


def test_nms_drops_the_lower_of_two_boxes(found):
    assert found.nms(0.5).track_ids.tolist() == [7, 9, 10]
    assert found.nms(0.9).track_ids.tolist() == [7, 8, 9, 10]


def test_nms_between_labels_is_a_choice():
    two = Detections([[0, 0, 10, 10], [0, 0, 10, 9]], [0.5, 0.6], [0, 1], ("a", "b"), SIZE)
    assert two.nms(0.5).text_labels == ["b", "a"]
    assert two.nms(0.5, class_agnostic=True).text_labels == ["b"]


def test_sort_by_each_key(found):
    assert found[[2, 0, 3, 1]].sort().track_ids.tolist() == [7, 8, 9, 10]
    assert found.sort("position").track_ids.tolist() == [10, 7, 8, 9]
    # 600, 504, 600 and 600 square pixels; ties keep their order.
    assert found.sort("area").track_ids.tolist() == [7, 9, 10, 8]
    assert found[[3, 2, 1, 0]].sort("label").track_ids.tolist() == [8, 7, 9, 10]
    with pytest.raises(ValueError, match="cannot be sorted by 'size'"):
        found.sort("size")


def test_equality_compares_values(found):
    assert found == found[:]
    assert found != found[:3]
    assert found != found[[1, 0, 2, 3]]
    assert Detections.none(["cat"], SIZE) == Detections.none(["cat"], SIZE)


def test_plot_draws_on_the_picture_of_the_right_size(found):
    picture = Image.new("RGB", SIZE, "white")
    drawn = found.plot(picture)
    assert drawn.size == SIZE
    assert drawn.tobytes() != picture.tobytes()
    with pytest.raises(ValueError, match="90x80 pixels, but these boxes are from one of 100x80"):
        found.plot(Image.new("RGB", (90, 80)))
    with pytest.raises(ValueError, match="has no name"):
        found.plot()


def test_a_label_is_drawn_in_its_own_colour():
    found = Detections([[20, 30, 80, 70]], [0.5], [0], ("cat",), SIZE, colors={"cat": "#00ff00"})
    assert found.plot(Image.new("RGB", SIZE)).getpixel((50, 70)) == (0, 255, 0)


def test_repr_names_the_best(found):
    assert repr(found) == "Detections(4 in 100x80 pixels: cat 0.90, cat 0.80, dog 0.70, hat 0.60)"
    assert repr(Detections.none(["cat"], SIZE)) == "Detections(0 in 100x80 pixels: nothing)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [0.5]}, "1 scores for 2 boxes"),
        ({"labels": [0, 3]}, "A label is 3"),
        ({"labels": [0, -1]}, "but there are 1 names"),
        ({"boxes": [[0, 0, 1, np.nan], [0, 0, 1, 1]]}, "not a finite number"),
        ({"masks": np.zeros((2, 5, 5))}, r"masks is \(2, 5, 5\)"),
        ({"size": (0, 5)}, "size is"),
    ],
)
def test_values_that_do_not_fit_are_refused(change, message):
    values = {"boxes": [[0, 0, 1, 1]] * 2, "scores": [0.5, 0.4], "labels": [0, 0], "names": ("a",), "size": SIZE}
    with pytest.raises(ValueError, match=message):
        Detections(**{**values, **change})
