"""Lanes: the results of one thread, in order, with no setting changed, and only where they pay."""

import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch
from PIL import Image

from gdino_hf import Detector
from gdino_hf.detection import lanes, prepared_pictures
from gdino_hf.detection import search as search_module
from gdino_hf.detection.detector import DetectionError
from gdino_hf.detection.lanes import count_lanes, in_lanes
from gdino_hf.inference.workers import can_split, thread_count
from random_models import make_random_model

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "demo" / "examples").glob("*.jpg"))
LABELS = ["cat", "cup", "person", "book"]
THRESHOLD = 0.05
# A batch sums in another order than single pictures do.
PIXELS, SCORES = 0.01, 1e-4

pytestmark = pytest.mark.skipif(not can_split(), reason="threads of one thread cannot be set here")


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def detector():
    return Detector("nano", device="cpu")


@pytest.fixture
def threads_of_forwards(detector):
    """The thread of each forward, and how many threads it was given."""
    seen = []
    handle = detector.model.register_forward_pre_hook(lambda *_: seen.append((threading.get_ident(), thread_count())))
    yield seen
    handle.remove()


def in_one_lane(detector, monkeypatch, sources, **options):
    with monkeypatch.context() as patch:
        patch.setattr(lanes, "_MOST_LANES", 1)
        return list(detector.stream(sources, LABELS, threshold=THRESHOLD, **options))


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_several_lanes_give_exactly_what_one_gives(detector, monkeypatch, threads_of_forwards, batch_size):
    sources = [*EXAMPLES, "/nowhere/x.jpg", *EXAMPLES, *EXAMPLES]
    expected = in_one_lane(detector, monkeypatch, sources, batch_size=batch_size)
    assert {thread for thread, _ in threads_of_forwards} == {threading.get_ident()}
    threads_of_forwards.clear()
    found = list(detector.stream(iter(sources), LABELS, threshold=THRESHOLD, batch_size=batch_size))
    assert threading.get_ident() not in {thread for thread, _ in threads_of_forwards}
    assert {threads for _, threads in threads_of_forwards} == {1}
    assert [source for source, _ in found] == sources
    for (source, one), (_, other) in zip(expected, found, strict=True):
        if source == "/nowhere/x.jpg":
            assert isinstance(other, DetectionError)
            continue
        assert len(one) > 0
        assert other.text_labels == one.text_labels
        assert (other.boxes == one.boxes).all()
        assert (other.scores == one.scores).all()


def test_automatic_batches_equal_single_pictures(detector):
    alone = detector.stream(EXAMPLES * 3, LABELS, threshold=THRESHOLD, batch_size=1)
    for (_, one), (_, other) in zip(alone, detector.stream(EXAMPLES * 3, LABELS, threshold=THRESHOLD), strict=True):
        assert other.text_labels == one.text_labels
        assert other.boxes == pytest.approx(one.boxes, abs=PIXELS)
        assert other.scores == pytest.approx(one.scores, abs=SCORES)


def test_lanes_leave_the_numbers_of_threads_alone(detector):
    def numbers():
        found = [torch.get_num_threads()]
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found

    for _ in detector.stream(EXAMPLES * 2, LABELS, threshold=THRESHOLD, batch_size=1):
        assert numbers() == [3, 3]
    assert numbers() == [3, 3]


def test_large_pictures_run_one_batch_at_a_time_with_all_threads(detector, monkeypatch, threads_of_forwards):
    monkeypatch.setattr(prepared_pictures, "_SMALL_PIXELS", 320 * 320 - 1)
    running, most, lock = 0, 0, threading.Lock()

    def count(change):
        nonlocal running, most
        with lock:
            running += change
            most = max(most, running)

    handles = [
        detector.model.register_forward_pre_hook(lambda *_: count(1)),
        detector.model.register_forward_hook(lambda *_: count(-1)),
    ]
    list(detector.stream(EXAMPLES * 2, LABELS))
    for handle in handles:
        handle.remove()
    assert most == 1
    assert [threads for _, threads in threads_of_forwards] == [3] * 6


def test_lanes_are_for_small_optimized_models_with_several_threads(detector, monkeypatch, tiny_config):
    assert count_lanes(detector.model) == 3
    monkeypatch.setattr(lanes, "_MOST_LANES", 2)
    assert count_lanes(detector.model) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert count_lanes(detector.model) == 1
    with torch.device("meta"):
        assert count_lanes(detector.model) == 1
    plain = make_random_model(tiny_config)
    assert count_lanes(plain) == 1
    monkeypatch.setattr(lanes, "_SMALL_MODEL", 1_000_000)
    assert count_lanes(detector.model) == 1
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert count_lanes(detector.model) == 1


def test_an_error_comes_after_all_earlier_results(detector):
    def function(batch):
        if batch == 5:
            raise KeyError("batch 5")
        return batch

    found = []
    with pytest.raises(KeyError, match="batch 5"):
        found.extend(in_lanes(detector.model, function, (number for number in range(9)), lambda _: True))
    assert found == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("most", [1, 3])
def test_leaving_early_ends_the_lanes_and_closes_the_source(detector, monkeypatch, most):
    monkeypatch.setattr(lanes, "_MOST_LANES", most)
    closed, before = threading.Event(), threading.active_count()

    def source():
        try:
            yield from range(1000)
        finally:
            closed.set()

    with closing(in_lanes(detector.model, lambda batch: batch, source(), lambda _: True)) as results:
        assert next(results) == 0
    assert closed.wait(10)
    assert threading.active_count() == before


def test_a_picture_that_breaks_the_model_breaks_no_other(detector, monkeypatch):
    bad = Image.new("RGB", (300, 300))
    score = search_module.score_pictures

    def breaks(model, texts, asked, inputs, sources):
        if bad in sources:
            raise RuntimeError("a picture that the model cannot take")
        return score(model, texts, asked, inputs, sources)

    monkeypatch.setattr(search_module, "score_pictures", breaks)
    found = [result for _, result in detector.stream([*EXAMPLES, bad, *EXAMPLES], LABELS)]
    assert [isinstance(result, DetectionError) for result in found] == [False] * 3 + [True] + [False] * 3
