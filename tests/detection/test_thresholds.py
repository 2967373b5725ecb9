"""Fitted thresholds: the best F1 or the wanted precision on known scores, under the detector's own rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from gdino_hf import Detections, Detector, Vocabulary, fit_thresholds
from gdino_hf.detection import thresholds
from gdino_hf.detection.thresholds import _choose, _judged, _Seen, _truth, judge_thresholds
from random_models import make_random_model

SIZE = (100, 100)


def found(rows, names=("cat", "dog")):
    """Detections from (x, score, label): boxes of 10 pixels a side in one row."""
    boxes = [[x, 0, x + 10, 10] for x, _, _ in rows]
    return Detections(boxes, [score for _, score, _ in rows], [label for _, _, label in rows], names, SIZE)


def truth(rows, crowd=None, absent=None):
    row = {"boxes": [[x, 0, x + 10, 10] for x, _ in rows], "names": [name for _, name in rows]}
    return _truth({**row, "crowd": crowd, "neg_names": absent}, {"cat": 0, "dog": 1})


def test_a_box_is_found_once_and_by_its_own_label():
    detections = found([(0, 0.9, 0), (1, 0.8, 0), (20, 0.7, 1), (40, 0.6, 0)])
    scores, right = _judged([detections], [truth([(0, "cat"), (20, "cat")])], 2)
    assert [each.tolist() for each in right] == [[True, False, False], [False]]
    assert scores[0].tolist() == pytest.approx([0.9, 0.8, 0.6])


def test_crowds_and_labels_that_a_picture_says_nothing_of_do_not_count():
    detections = found([(0, 0.9, 0), (20, 0.7, 1)])
    scores, _ = _judged([detections], [truth([(0, "cat")], crowd=[True], absent=[])], 2)
    assert [len(each) for each in scores] == [0, 0]
    scores, right = _judged([detections], [truth([], absent=["dog"])], 2)
    assert [len(each) for each in scores] == [0, 1]
    assert right[1].tolist() == [False]


@pytest.mark.parametrize(
    ("right", "boxes", "precision", "kept"),
    [
        ([1, 1, 0, 0], 2, None, 2),
        ([1, 0, 1, 1, 0, 0, 0], 3, None, 4),
        ([0, 0, 1], 10, None, 3),
        ([1, 0, 1, 1, 0, 0, 0], 3, 0.75, 4),
        ([1, 0, 1, 1, 0, 0, 0], 3, 0.9, 1),
        ([0, 1, 1], 3, 0.9, 0),
        ([0, 0], 3, None, 0),
        ([], 3, None, 0),
    ],
)
def test_the_best_threshold_keeps_the_best_detections(right, boxes, precision, kept):
    scores = np.linspace(0.9, 0.3, len(right)) if right else np.zeros(0)
    threshold = _choose(scores, np.array(right, dtype=bool), boxes, precision)
    assert (scores > threshold).sum() == kept


def test_equal_scores_are_not_separated():
    threshold = _choose(np.array([0.5, 0.5, 0.2]), np.array([True, False, False]), 1, None)
    assert 0.2 < threshold < 0.5


def test_figures_follow_the_rule_of_the_detector():
    both = found([(0, 0.9, 0), (0, 0.5, 1), (20, 0.4, 1)])
    truths = [truth([(0, "dog"), (20, "dog")])]
    seen = _Seen([both], truths, np.array([0, 2]), [])
    # Where "cat" passes, it takes the first box from "dog".
    assert seen.figures(np.array([0.1, 0.1]))[1] == pytest.approx((1.0, 0.5, 2 / 3))
    assert seen.figures(np.array([0.95, 0.1]))[1] == (1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def detector(tiny_config, tiny_processor):
    return Detector(make_random_model(tiny_config).double(), processor=tiny_processor, device=None, optimize=False)


LABELS = ["cat", "dog", "remote control", "red car", "hat", "traffic light"]


def annotated(detector, seeds):
    """Return rows whose true boxes are the detector's own best third of each label, and the lowest score of each."""
    pictures = []
    for seed in seeds:
        pixels = torch.randint(0, 256, (64, 80, 3), generator=torch.Generator().manual_seed(seed))
        pictures.append(Image.fromarray(pixels.to(torch.uint8).numpy()))
    own = detector(pictures, LABELS, threshold=0.02)
    scores = {label: sorted(d.score for found in own for d in found if d.text_label == label) for label in LABELS}
    limits = {label: values[-len(values) // 3] for label, values in scores.items() if len(values) >= 15}
    rows = []
    for picture, found in zip(pictures, own, strict=True):
        keep = [each for each in found if each.score >= limits.get(each.text_label, 2)]
        rows.append(
            {"image": picture, "boxes": [each.box for each in keep], "names": [each.text_label for each in keep]}
        )
    return rows, limits


def test_thresholds_that_made_the_boxes_are_found_again(detector, monkeypatch):
    monkeypatch.setattr(thresholds, "_PRIOR_BOXES", 0)
    rows, limits = annotated(detector, range(6))
    assert len(limits) >= 2
    fit = fit_thresholds(detector, rows, LABELS)
    assert fit.f1_single < fit.f1
    for label, limit in limits.items():
        assert fit.labels[label].is_fitted
        # Boxes that lie close together take each other's true boxes.
        assert fit.labels[label].f1 > 0.8
        assert fit.labels[label].threshold == pytest.approx(limit, abs=0.05)


def test_fitted_vocabulary_is_saved_with_its_thresholds(detector, tmp_path):
    rows, _ = annotated(detector, range(3))
    fit = fit_thresholds(detector, rows)
    fit.vocabulary.save(tmp_path / "v.safetensors")
    again = Vocabulary.load(tmp_path / "v.safetensors")
    assert torch.equal(again.thresholds(0.3), fit.vocabulary.thresholds(0.3))
    assert again.encoded is not None


def test_judging_the_pictures_of_the_fit_gives_its_figures(detector):
    rows, _ = annotated(detector, range(3))
    fit = fit_thresholds(detector, rows, min_boxes=1)
    judged = judge_thresholds(detector, rows, fit.vocabulary)
    assert {name: each.f1 for name, each in judged.items()} == {name: each.f1 for name, each in fit.labels.items()}
    alone = judge_thresholds(detector, rows, Vocabulary(fit.vocabulary.labels), threshold=fit.single)
    assert np.mean([each.f1 for each in alone.values()]) == pytest.approx(fit.f1_single)
    assert [each.threshold for each in alone.values()] == pytest.approx([fit.single] * len(alone))


def test_pictures_that_cannot_be_used_are_listed(detector):
    rows, _ = annotated(detector, range(2))
    rows.insert(1, {"image": "/nowhere.jpg", "boxes": [[0, 0, 1, 1]], "names": ["cat"]})
    fit = fit_thresholds(detector, rows)
    assert [source for source, _ in fit.failed] == ["/nowhere.jpg"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"image": Image.new("RGB", (9, 9)), "boxes": [[0, 0, 1, 1]], "names": ["hat"]}],
            {"labels": "cat"},
            "No picture",
        ),
        ([], {"labels": "cat"}, "No picture has a box of cat"),
        ([], {"labels": "cat", "precision": 0}, "precision is 0"),
    ],
)
def test_data_that_cannot_be_fitted_are_refused(detector, rows, options, message):
    with pytest.raises(ValueError, match=message):
        fit_thresholds(detector, rows, **options)


def test_nano_gains_f1_on_everyday(shared):
    fit = fit_thresholds(Detector("nano", device="cpu"), first(shared / "data" / "everyday" / "val.json", 60))
    assert fit.f1 > fit.f1_single


def first(file, count):
    from gdino_hf.data.formats import open_dataset

    rows, _ = open_dataset(file)
    return [rows[place] for place in range(count)]
