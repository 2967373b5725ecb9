"""Stored outputs: thresholds, switches and advice need no forward pass, and storage is bounded."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from gdino_demo import engine as module
from gdino_demo.engine import KeptOutputs, Models, Settings
from gdino_demo.render import advice
from gdino_demo.safety import Picture, Refused, read_picture


@pytest.fixture(scope="module")
def models(tiny_folder):
    from gdino_hf import GDinoForObjectDetection, GDinoProcessor

    model = GDinoForObjectDetection.from_pretrained(tiny_folder)
    return Models({"tiny": (model, GDinoProcessor.from_pretrained(tiny_folder))})


@pytest.fixture(scope="module")
def photograph(example_folder):
    return read_picture(example_folder / "cat.jpg", "cat.jpg")


@pytest.fixture(scope="module")
def outputs(models, photograph):
    return models.run("tiny", photograph, ["cat", "dog", "red cup"], ["person"])


def test_thresholds_nms_and_switches_need_no_forward_pass(models, outputs):
    forwards = models.forwards
    every = outputs.detections(Settings(threshold=0.0))
    assert len(every) > 5
    assert "person" not in {detection.label for detection in every}
    middle = sorted(detection.score for detection in every)[len(every) // 2]
    assert outputs.detections(Settings(threshold=middle)) == [each for each in every if each.score > middle]
    twice = SimpleNamespace(**{name: torch.cat((x, x), dim=1) for name, x in vars(outputs.raw).items()})
    doubled = dataclasses.replace(outputs, raw=twice)
    assert len(doubled.detections(Settings(threshold=0.0))) == 2 * len(every)
    assert doubled.detections(Settings(threshold=0.0, nms=0.9)) == every
    label = every[0].label
    shown = outputs.detections(Settings(threshold=0.0, hidden=frozenset([label])))
    assert shown == [detection for detection in every if detection.label != label]
    assert models.forwards == forwards


def test_grounding_gives_the_best_box_of_every_phrase(outputs):
    best = dataclasses.replace(outputs, grounding=True).detections(Settings(threshold=0.0))
    assert sorted(detection.label for detection in best) == ["cat", "dog", "red cup"]
    assert [detection.score for detection in best] == sorted((each.score for each in best), reverse=True)


def test_following_the_advice_shows_the_box_it_names(outputs):
    high = Settings(threshold=1.0)
    assert outputs.detections(high) == []
    text = advice(outputs, high)
    assert f"{outputs.best().score:.3f}" in text
    lower = float(text.partition(" to ")[2].split()[0])
    assert outputs.best() in outputs.detections(Settings(threshold=lower))
    hidden = Settings(threshold=0.0, hidden=frozenset(outputs.labels))
    assert "switched off" in advice(outputs, hidden)


def test_many_threads_get_the_results_of_one(models, photograph):
    import concurrent.futures

    alone = models.run("tiny", photograph, ["cat"])
    forwards = models.forwards
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: models.run("tiny", photograph, ["cat"]), range(8)))
    assert models.forwards == forwards + 8
    assert all(torch.equal(answer.raw.logits, alone.raw.logits) for answer in answers)


@pytest.mark.parametrize(
    ("name", "labels", "negatives", "sentence"),
    [
        ("other", ["cat"], [], "no model of this name"),
        ("tiny", ["cat"], ["Cat"], "leave it in one"),
        ("tiny", ["cat " * 100], [], "shorten it"),
    ],
)
def test_unknown_models_and_unusable_labels_are_refused(models, photograph, name, labels, negatives, sentence):
    forwards = models.forwards
    with pytest.raises(Refused, match=sentence):
        models.run(name, photograph, labels, negatives)
    with pytest.raises(Refused, match=sentence):
        models.check(name, labels, negatives)
    assert models.forwards == forwards


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


def test_a_video_frame_without_a_file_gives_the_same_boxes(models, photograph):
    frame = Picture(photograph.image, b"", "frame")
    assert torch.equal(
        models.run("tiny", frame, ["cat"]).raw.pred_boxes, models.run("tiny", photograph, ["cat"]).raw.pred_boxes
    )
