"""Scores of a gdino-nano that mean something: the fit, and its place in the weights."""

import json

import numpy as np
import pytest
import torch

from gdino_hf.detection.detector import Detector
from gdino_hf.model.modeling_gdino import GDinoForObjectDetection
from gdino_hf.recipes import nano, nano_scores
from gdino_hf.recipes.nano_scores import Judged, ScoreFit, fit_scores, fold, judge, right_detections


@pytest.fixture
def model_and_processor(parts):
    torch.manual_seed(0)
    model, processor = nano.build(str(parts / "backbone"), str(parts / "text"), image_size=64)
    for head in (*model.class_embed, model.model.encoder_output_class_embed):
        torch.nn.init.normal_(head.bias)
    return model.eval(), processor


def test_folding_changes_every_logit_as_fitted_and_no_box(model_and_processor):
    model, processor = model_and_processor
    torch.manual_seed(1)
    inputs = processor(
        images=[np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)], text=["red", "blue"]
    )
    with torch.no_grad():
        before = model(**inputs, output_hidden_states=True)
        fold(model, ScoreFit(1.7, -0.4))
        after = model(**inputs, output_hidden_states=True)
    real = before.logits.isfinite()
    torch.testing.assert_close(after.logits[real], 1.7 * before.logits[real] - 0.4, rtol=1e-4, atol=1e-4)
    assert torch.equal(after.logits.isfinite(), real)
    torch.testing.assert_close(after.pred_boxes, before.pred_boxes, rtol=1e-5, atol=1e-5)
    proposals = before.enc_outputs_class
    torch.testing.assert_close(
        after.enc_outputs_class[proposals.isfinite()],
        1.7 * proposals[proposals.isfinite()] - 0.4,
        rtol=1e-4,
        atol=1e-4,
    )


def test_heads_without_a_bias_are_refused(model_and_processor):
    model = model_and_processor[0]
    model.config.class_head = "dot"
    with pytest.raises(ValueError, match="class_head is 'dot'"):
        fold(model, ScoreFit(2.0, 0.0))


def drawn(factor, shift, count=4000):
    """Detections whose chance to be right is a known function of their score."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-1.5, 1.5, count)
    chance = 1 / (1 + np.exp(-(factor * logits + shift)))
    right = rng.random(count) < chance
    return Judged(1 / (1 + np.exp(-logits)), right, int(right.sum() * 1.25))


def test_the_default_threshold_becomes_the_best_one():
    judged = drawn(1.5, 1.0)
    fit = fit_scores(judged, precision=0.0)
    fitted = Judged(fit(judged.scores), judged.right, judged.num_boxes)

    def f1(threshold):
        precision, recall = fitted.at(threshold)
        return 2 * precision * recall / max(1e-9, precision + recall)

    assert f1(0.3) >= max(f1(x) for x in np.linspace(0.02, 0.98, 97)) - 1e-3
    # The factor is the one that the detections were drawn with, as far as the threshold lets it.
    assert fit.factor == pytest.approx(1.5, rel=0.25)


def test_a_wanted_precision_is_reached_at_the_default_threshold():
    judged = drawn(1.0, -0.5)
    loose, strict = fit_scores(judged, precision=0.0), fit_scores(judged, precision=0.75)
    figures = [Judged(fit(judged.scores), judged.right, judged.num_boxes).at(0.3) for fit in (loose, strict)]
    assert figures[0][0] < 0.7
    assert figures[1][0] == pytest.approx(0.75, abs=0.01)
    assert figures[1][1] < figures[0][1]


def test_nothing_can_be_fitted_to_detections_that_are_all_wrong():
    with pytest.raises(ValueError, match="None of 3 detections is right"):
        fit_scores(Judged(np.array([0.1, 0.2, 0.3]), np.zeros(3, dtype=bool), 5))


def test_each_box_counts_once_and_crowds_not_at_all():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60], [0, 0, 10, 10]], dtype=float)
    labels = np.array([0, 0, 1, 1])
    truth = np.array([[0, 0, 10, 10], [40, 40, 90, 90]], dtype=float)
    right, counts = right_detections(boxes, labels, truth, np.array([0, 1]), np.array([False, True]))
    assert right.tolist() == [True, False, False, False]
    # The second is a duplicate, the third lies in a crowd of its name, the fourth has another name.
    assert counts.tolist() == [True, True, False, True]


def test_detections_without_truth_are_wrong():
    right, counts = right_detections(
        np.array([[0.0, 0, 1, 1]]), np.array([0]), np.zeros((0, 4)), np.zeros(0, dtype=int), np.zeros(0, dtype=bool)
    )
    assert (right.tolist(), counts.tolist()) == ([False], [True])


def test_duplicates_are_wrong_unless_they_are_suppressed(parts, model_and_processor):
    model, processor = model_and_processor
    rows = nano_scores.read_coco(parts / "data" / "train.json")
    detector = Detector(model, processor=processor, optimize=False)
    options = ({}, {"nms_threshold": 0.0})
    every, few = (judge(detector, [rows[i] for i in (0, 1)], ["red", "blue"], **each) for each in options)
    assert (every.num_boxes, few.num_boxes) == (2, 2)
    assert len(few.scores) < len(every.scores)


def test_the_command_exports_what_it_fitted(parts, model_and_processor, tmp_path, capsys, monkeypatch):
    model, processor = model_and_processor
    nano.export(model, processor, tmp_path / "start")
    # An untrained model finds nothing right, so what is right is made up; the rest is as it is.
    monkeypatch.setattr(nano_scores, "RIGHT_IOU", 1e-3)
    monkeypatch.setattr(nano_scores, "LOWEST", 0.0)
    command = [str(tmp_path / "start"), "--everyday", str(parts / "data"), "--export", str(tmp_path / "fitted")]
    nano_scores.main([*command, "--hold-out", "3", "--processor", str(tmp_path / "start"), "--precision", "0"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["photographs"] == 4
    fitted = GDinoForObjectDetection.from_pretrained(tmp_path / "fitted").eval()
    rows = nano_scores.read_coco(parts / "data" / "train.json")
    judged = judge(
        Detector(fitted, processor=processor, optimize=False), [rows[i] for i in (0, 3, 6, 9)], ["red", "blue"]
    )
    assert judged.at(0.3) == pytest.approx((printed["after"]["precision"], printed["after"]["recall"]), abs=0.02)
