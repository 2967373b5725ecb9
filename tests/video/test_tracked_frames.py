"""Detector.track: frames with track ids, every frame or every few, whole or in halves, in bounded memory."""

import warnings
import weakref

import numpy as np
import pytest
from PIL import Image

from gdino_hf import Detections, Detector
from gdino_hf.video.between_detections import between, moment
from gdino_hf.video.frame_sources import open_source
from gdino_hf.video.tracked_frames import VideoWarning
from gdino_hf.video.tracking import Tracker
from tracking_figures import photographs
from video_clips import flat_frames, write_clip

LABELS = ["cat"]
# Pixels by which a batch changes boxes.
ROUNDING = 0.01


@pytest.fixture(scope="module")
def detector():
    return Detector("nano", device="cpu")


@pytest.fixture(scope="module")
def frames():
    """A cat that moves to the right."""
    cat = photographs()[0].resize((240, 160))
    pictures = []
    for number in range(10):
        picture = Image.new("RGB", (320, 200), (120, 140, 120))
        picture.paste(cat, (6 * number, 10))
        pictures.append(picture)
    return pictures


@pytest.fixture(scope="module")
def every_third(detector, frames):
    return list(detector.track(frames, LABELS, every=3))


def test_frames_come_in_order_with_ids(detector, frames):
    tracked = list(detector.track(frames[:4], LABELS, rate=10))
    assert [frame.number for frame in tracked] == [0, 1, 2, 3]
    assert [frame.seconds for frame in tracked] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [len(frame.found) for frame in tracked] == [0, 1, 1, 1]
    assert all(frame.found.track_ids.tolist() == [1] for frame in tracked[1:])
    assert all(frame.detected for frame in tracked)
    for frame, picture in zip(tracked, frames, strict=False):
        assert np.array_equal(np.asarray(frame.image), np.asarray(picture))
    # The boxes are the detector's own.
    alone = detector(frames[2], LABELS, nms_threshold=0.7)
    np.testing.assert_allclose(tracked[2].found.boxes, alone.boxes, atol=ROUNDING)


def test_boxes_between_detections_move_evenly(every_third):
    assert [frame.detected for frame in every_third] == [number % 3 == 0 for number in range(10)]
    # The object is confirmed at the second detection.
    assert [len(frame.found) for frame in every_third] == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    at = {frame.number: frame.found.boxes[0] for frame in every_third[3:]}
    np.testing.assert_allclose(at[4], at[3] + (at[6] - at[3]) / 3, atol=0.01)
    np.testing.assert_allclose(at[5], at[3] + 2 * (at[6] - at[3]) / 3, atol=0.01)
    assert 5 < at[6][0] - at[3][0] < 25


@pytest.mark.parametrize(("cut", "every"), [(3, 1), (6, 3), (5, 3)])
def test_ids_are_equal_whether_run_whole_or_in_two_halves(detector, frames, every_third, tmp_path, cut, every):
    frames = frames if every == 3 else frames[:5]
    whole = every_third if every == 3 else list(detector.track(frames, LABELS))
    tracker = Tracker(rate=25 / every, patience=1.0)
    first = list(detector.track(frames[:cut], LABELS, every=every, tracker=tracker))
    tracker.save(tmp_path / "state.json")
    resumed = Tracker.load(tmp_path / "state.json")
    second = list(detector.track(frames[cut:], LABELS, every=every, tracker=resumed))
    both = first + second
    assert [frame.detected for frame in both] == [frame.detected for frame in whole]
    # Boxes at the end of the first half are guessed, because the detection after them is in the second.
    assert [frame.found.track_ids.tolist() for frame in both] == [frame.found.track_ids.tolist() for frame in whole]
    for one, other in zip(both, whole, strict=True):
        if one.detected:
            np.testing.assert_allclose(one.found.boxes, other.found.boxes, atol=ROUNDING)
    assert [frame.number for frame in second] == list(range(len(frames) - cut))


def test_a_part_of_a_video_resumes_where_it_ended(detector, frames, tmp_path):
    path = write_clip(tmp_path / "clip.mkv", frames[:6], codec="ffv1", pixels="bgr0")
    whole = list(detector.track(path, LABELS))
    tracker = Tracker(rate=10)
    parts = [*detector.track(path, LABELS, tracker=tracker, end=0.3)]
    parts += detector.track(path, LABELS, tracker=tracker, start=0.3)
    assert [frame.number for frame in parts] == list(range(6))
    for one, other in zip(parts, whole, strict=True):
        assert one.found.track_ids.tolist() == other.found.track_ids.tolist()
        np.testing.assert_allclose(one.found.boxes, other.found.boxes, atol=ROUNDING)


def test_text_is_encoded_once(detector, frames):
    calls = []
    handle = detector.model.base_model.text_backbone.register_forward_hook(lambda *given: calls.append(1))
    try:
        list(detector.track(frames[:3], ["a word that no other test has"]))
    finally:
        handle.remove()
    assert len(calls) == 1


def test_frames_are_let_go(detector, frames):
    alive = []

    def pictures():
        for number in range(60):
            picture = frames[0].copy()
            alive.append(weakref.ref(picture))
            yield picture
            assert sum(each() is not None for each in alive) < 25, number

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sum(1 for _ in detector.track(pictures(), LABELS, every=10)) == 60


def test_a_damaged_video_gives_its_frames_and_a_warning(detector, tmp_path):
    path = write_clip(tmp_path / "cut.mkv", flat_frames(8), codec="ffv1", pixels="bgr0")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.warns(VideoWarning, match=r"cut\.mkv is cut off"):
        assert 2 <= len(list(detector.track(path, LABELS))) < 8


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"every": 0}, ValueError, "every is 0"),
        ({"every": 500}, ValueError, "every is 500; give at most 120"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"tracker": "magic"}, ValueError, "no tracker 'magic'"),
        ({"threshold": 3}, ValueError, "threshold is 3"),
        ({"patience": 0}, ValueError, "patience is 0"),
        ({"volume": 11}, TypeError, "volume"),
    ],
)
def test_options_are_checked_before_the_first_frame(detector, frames, options, error, sentence):
    with pytest.raises(error, match=sentence):
        detector.track(frames, LABELS, **options)


def test_sources_that_were_opened_and_batches_give_equal_frames(detector, frames):
    alone = list(detector.track(frames[:5], LABELS))
    together = list(detector.track(open_source(frames[:5]), LABELS, batch_size=2))
    assert [frame.found.track_ids.tolist() for frame in together] == [frame.found.track_ids.tolist() for frame in alone]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.found.boxes, other.found.boxes, atol=0.1)


def test_what_is_found_once_is_not_placed_between():
    def at(seconds, ids, left):
        boxes = [[left + 10 * number, 0, left + 10 * number + 5, 5] for number in ids]
        found = Detections(boxes, [0.5] * len(ids), [0] * len(ids), ("cat",), (100, 10), track_ids=ids)
        return moment(found, seconds)

    earlier, later = at(1.0, [1, 2], 0), at(2.0, [2, 3], 4)
    middle = between(earlier, later, 1.25, ("cat",), (100, 10), {})
    assert middle.track_ids.tolist() == [2]
    assert middle.boxes.tolist() == [[21, 0, 26, 5]]
    # After the last detection, motion goes on and what has no past stays where it is.
    after = between(later, None, 3.0, ("cat",), (100, 10), {}, before=earlier)
    assert after.track_ids.tolist() == [2, 3]
    assert after.boxes[:, 0].tolist() == [28, 34]
    assert len(between(None, None, 3.0, ("cat",), (100, 10), {})) == 0
    assert len(between(earlier, later, 1.5, ("dog",), (100, 10), {})) == 0
