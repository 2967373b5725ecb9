"""Stored outputs: thresholds, switches and advice need no forward pass, and storage is bounded."""

import dataclasses

import numpy as np
import pytest
from gdino_demo import outputs as module
from gdino_demo.engine import Models
from gdino_demo.outputs import KeptOutputs, Settings
from gdino_demo.queries import WHOLE, Query, read_caption, read_query
from gdino_demo.render import advice
from gdino_demo.safety import read_picture

from gdino_hf import Detector, Vocabulary

QUERY = read_query("cat, dog, red cup", "person")


@pytest.fixture(scope="module")
def detector(tiny_folder):
    return Detector(tiny_folder)


@pytest.fixture(scope="module")
def models(detector):
    return Models({"tiny": detector})


@pytest.fixture(scope="module")
def photograph(example_folder):
    return read_picture(example_folder / "cat.jpg", "cat.jpg")


@pytest.fixture(scope="module")
def outputs(models, photograph):
    return models.run("tiny", photograph, QUERY)


def test_thresholds_nms_and_switches_need_no_forward_pass(models, outputs):
    forwards = models.forwards
    every = outputs.detections(Settings(threshold=0.0))
    assert len(every) > 5
    assert "person" not in every.text_labels
    middle = float(np.median(every.scores))
    assert outputs.detections(Settings(threshold=middle)) == every.filter(threshold=middle)
    assert outputs.detections(Settings(threshold=0.0, nms=0.5)) == every.nms(0.5)
    label = every.text_labels[0]
    shown = outputs.detections(Settings(threshold=0.0, hidden=frozenset([label])))
    assert shown == every.filter(labels=set(every.names) - {label})
    assert shown.presence == every.presence
    assert models.forwards == forwards


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5])
def test_results_are_those_of_the_detector(detector, models, photograph, threshold):
    settings = Settings(threshold, nms=0.6)
    vocabulary = Vocabulary({"cat": ["cat", "kitten"], "dog": None}, negative=["cup"], thresholds={"dog": 0.35})
    options = {"threshold": threshold, "nms_threshold": 0.6}
    for query, expected in (
        (Query(vocabulary), detector(photograph.image, vocabulary, **options)),
        (Query(vocabulary, tiles=150), detector(photograph.image, vocabulary, tiles=150, **options)),
        (
            read_caption("a cat on a red sofa", WHOLE),
            detector.ground(photograph.image, "a cat on a red sofa", **options),
        ),
    ):
        found = models.run("tiny", photograph, query).detections(settings)
        assert found.names == expected.names
        assert found.caption == expected.caption
        assert found.spans == expected.spans
        assert found.presence == pytest.approx(expected.presence, abs=1e-5)
        if threshold > 0 or not query.tiles:
            assert found.text_labels == expected.text_labels
            assert np.allclose(found.scores, expected.scores, atol=1e-5)
            assert np.allclose(found.boxes, expected.boxes, atol=0.05)


def test_only_the_best_of_many_candidates_are_merged(models, photograph, monkeypatch):
    outputs = models.run("tiny", photograph, dataclasses.replace(QUERY, tiles=150))
    every = outputs.detections(Settings(threshold=0.0))
    monkeypatch.setattr(module, "MOST_CANDIDATES", 10)
    best = outputs.detections(Settings(threshold=0.0))
    assert 0 < len(best) <= 10 < len(every)
    assert best.scores[0] == every.scores[0]
    assert best.presence == every.presence


def test_following_the_advice_shows_the_box_it_names(outputs):
    high = Settings(threshold=1.0)
    assert len(outputs.detections(high)) == 0
    text = advice(outputs, high)
    assert f"{outputs.best().score:.3f}" in text
    lower = float(text.partition(" to ")[2].split()[0])
    assert outputs.best() in list(outputs.detections(Settings(threshold=lower)))
    hidden = Settings(threshold=0.0, hidden=frozenset(outputs.labels))
    assert "switched off" in advice(outputs, hidden)


def test_advice_names_a_threshold_of_the_vocabulary_file(models, photograph):
    outputs = models.run("tiny", photograph, Query(Vocabulary(["cat"], thresholds={"cat": 1.0})))
    assert len(outputs.detections(Settings(threshold=0.0))) == 0
    assert advice(outputs, Settings(threshold=0.0)).endswith("asks for more than 1.000 for that label.")


def test_stored_outputs_are_bounded_and_replaced(outputs):
    one = outputs.num_bytes
    assert one > len(outputs.data)
    kept = KeptOutputs(most_bytes=3 * one)
    keys = [kept.put(outputs) for _ in range(5)]
    assert [kept.get(key) is not None for key in keys] == [False, False, True, True, True]
    assert len(set(keys)) == 5
    replaced = kept.put(outputs, replaces=keys[-1])
    assert kept.get(keys[-1]) is None
    assert kept.get(replaced) is outputs
    assert kept.get(None) is None
    assert kept.get("guess") is None


def test_expired_outputs_are_removed_without_requests(outputs, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    kept = KeptOutputs(seconds=60)
    kept.put(outputs)
    clock[0] += 59
    kept.sweep()
    assert len(kept) == 1
    clock[0] += 2
    kept.sweep()
    assert len(kept) == 0


def test_the_newest_outputs_are_kept_even_if_they_are_large(outputs):
    kept = KeptOutputs(most_bytes=1)
    first = kept.put(outputs)
    second = kept.put(dataclasses.replace(outputs))
    assert kept.get(first) is None
    assert kept.get(second) is not None
