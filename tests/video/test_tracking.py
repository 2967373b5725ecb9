"""Track ids against the exact truth of generated videos, and trackers that are saved and resumed."""

import json
import warnings

import numpy as np
import pytest
from PIL import Image

from gdino_hf import Detections
from gdino_hf.recipes.moving_scenes import KINDS
from gdino_hf.video.tracking import TRACKERS, Tracker
from tracking_figures import figures, perfect, scenes

NAMES = ("cat", "dog")


def moving(number, label=0, score=0.9, x=0.0):
    """One box that moves by three pixels in a frame."""
    left = x + 3.0 * number
    return Detections([[left, 10, left + 20, 30]], [score], [label], NAMES, (640, 48))


def joined(*parts):
    return Detections(
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.labels for part in parts]),
        NAMES,
        parts[0].size,
    )


def follow(tracker, founds, rate=25.0, first=0):
    return [tracker.update(found, (first + number) / rate) for number, found in enumerate(founds)]


@pytest.mark.parametrize("kind", KINDS)
def test_identities_of_perfect_boxes_are_right(kind):
    scene = scenes(kind, frames=80)
    tracker = Tracker("bytetrack")
    frames = [
        (truth, tracker.update(perfect(truth, scene.labels, scene.size), number / 25))
        for number, (_, truth) in enumerate(scene)
    ]
    assert figures(frames)["idf1"] >= 0.9


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_ids_are_equal_whether_run_whole_or_in_two_halves(name, tmp_path):
    scene = scenes("crossings", seed=3, frames=24)
    frames = list(scene)

    def run(tracker, part):
        return [
            tracker.update(perfect(frames[number][1], scene.labels, scene.size), number / 25, frames[number][0])
            for number in part
        ]

    whole = run(Tracker(name), range(24))
    assert len({number for found in whole for number in found.track_ids.tolist()}) >= 5
    first = Tracker(name)
    halves = run(first, range(11))
    first.save(tmp_path / "state.json")
    second = Tracker.load(tmp_path / "state.json")
    halves += run(second, range(11, 24))
    assert halves == whole


def test_labels_are_kept_apart_and_ids_are_unique():
    founds = [joined(moving(number, 0), moving(number, 1)) for number in range(10)]
    tracked = follow(Tracker(), founds)
    assert [set(zip(found.text_labels, found.track_ids.tolist(), strict=True)) for found in tracked[1:]] == [
        {("cat", 1), ("dog", 2)}
    ] * 9
    # The cat becomes a dog: another track.
    tracker = Tracker()
    follow(tracker, [moving(number, 0) for number in range(5)])
    later = follow(tracker, [moving(number, 1) for number in range(5, 10)], first=5)
    assert [found.track_ids.tolist() for found in later] == [[], [2], [2], [2], [2]]


def test_low_scores_continue_a_track_and_begin_none():
    scores = [0.9, 0.9, 0.2, 0.2, 0.9]
    tracked = follow(Tracker(threshold=0.3), [moving(number, score=score) for number, score in enumerate(scores)])
    assert [found.track_ids.tolist() for found in tracked] == [[], [1], [1], [1], [1]]
    assert all(len(found) == 0 for found in follow(Tracker(), [moving(number, score=0.2) for number in range(5)]))


def test_labels_may_have_thresholds_of_their_own():
    tracker = Tracker(threshold=0.3, thresholds={"dog": 0.6})
    founds = [joined(moving(number, 0, 0.5), moving(number, 1, 0.5)) for number in range(4)]
    assert {label for found in follow(tracker, founds) for label in found.text_labels} == {"cat"}
    assert tracker.low_thresholds(NAMES) == {"cat": 0.15, "dog": 0.3}


@pytest.mark.parametrize(("away", "same"), [(20, True), (40, False)])
def test_an_object_out_of_sight_keeps_its_id_for_as_long_as_patience_lasts(away, same):
    nothing = Detections.none(NAMES, (640, 48))
    founds = [moving(number) if number < 5 or number >= 5 + away else nothing for number in range(10 + away)]
    tracked = follow(Tracker(patience=1.2), founds)
    assert (tracked[-1].track_ids.tolist() == [1]) is same
    assert tracked[-1].track_ids.tolist() in ([1], [2])


def test_nothing_is_kept_of_objects_that_are_gone():
    tracker = Tracker()
    sizes = []
    for start in range(0, 600, 60):
        for number in range(start, start + 30):
            tracker.update(moving(number - start, x=float(start % 90)), number / 25)
        for number in range(start + 30, start + 60):
            tracker.update(Detections.none(NAMES, (640, 48)), number / 25)
        sizes.append(len(json.dumps(tracker.state())))
    assert tracker.count == 10
    assert max(sizes[1:]) < 1.1 * sizes[1]


def test_no_library_warning_reaches_the_caller():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in TRACKERS:
            image = Image.new("RGB", (640, 48))
            tracker = Tracker(name)
            for number in range(4):
                tracker.update(joined(moving(number, 0), moving(number, 1)), number / 25, image)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"name": "magic"}, ValueError, "no tracker 'magic'; choose bytetrack"),
        ({"threshold": 2}, ValueError, "threshold is 2"),
        ({"patience": 0}, ValueError, "patience is 0"),
        ({"rate": 0}, ValueError, "rate is 0"),
        ({"depth": 3}, TypeError, "no option 'depth'; choose lost_track_buffer"),
    ],
)
def test_options_out_of_their_range_are_refused(options, error, sentence):
    with pytest.raises(error, match=sentence):
        Tracker(**options)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state | {"version": 99},
        lambda state: state | {"tracker": "magic"},
        lambda state: state | {"values": {"!": "class", "name": "os:system"}},
        lambda state: state | {"values": {"!": "class", "name": "trackers.core.base:np"}},
        lambda state: state | {"values": {"!": "object", "class": {"!": "class", "name": "subprocess:Popen"}}},
        lambda state: state | {"values": {"!": "array", "type": "O", "shape": [1], "data": "AAAAAAAAAAA="}},
        lambda state: state | {"values": {"!": "dict", "items": []}},
        lambda state: state | {"values": 3},
        lambda state: [],
    ],
)
def test_broken_and_hostile_states_are_refused(change, tmp_path):
    path = tmp_path / "state.json"
    path.write_text(json.dumps(change(Tracker().state())))
    with pytest.raises(ValueError, match=r"state\.json cannot be read"):
        Tracker.load(path)
