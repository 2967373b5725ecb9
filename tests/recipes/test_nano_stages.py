"""Accuracy of each stage of a gdino-nano."""

import json

import pytest
import torch
from PIL import Image

from gdino_hf.evaluation.predict import predict
from gdino_hf.model.csp_pan import CspPanBackbone
from gdino_hf.recipes import nano, nano_stages
from gdino_hf.recipes.closed_set_teacher import ClosedSetHead
from gdino_hf.recipes.nano_stages import MOST_DETECTIONS, detections, name_scores


def test_name_scores_are_means_over_the_names_tokens():
    logits = torch.tensor([[0.0, 2.0, -2.0, 5.0, 1.0, 9.0]])
    found = name_scores(logits, torch.tensor([-1, 0, 0, -1, 1]), 3)
    assert found.tolist() == [pytest.approx([0.5, torch.tensor(1.0).sigmoid().item(), 0.0])]


def test_detections_are_the_best_pairs_and_suppression_drops_duplicates_of_a_name():
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.38], [0.2, 0.2, 0.1, 0.1]])
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.7], [0.05, 0.6]])
    every = detections(scores, boxes, None)
    assert every[0].tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.1, 0.05])
    assert every[1].tolist() == [0, 0, 1, 1, 1, 0]
    kept, names, corners = detections(scores, boxes, 0.6)
    assert (kept.tolist(), names.tolist()) == (pytest.approx([0.9, 0.7, 0.6, 0.05]), [0, 1, 1, 0])
    assert corners[0].tolist() == pytest.approx([0.3, 0.3, 0.7, 0.7])
    assert len(detections(torch.rand(90, 2), torch.rand(90, 4), None)[0]) == MOST_DETECTIONS


def test_the_decoder_stage_is_what_evaluation_measures(parts):
    torch.manual_seed(0)
    model, processor = nano.build(str(parts / "backbone"), str(parts / "text"), image_size=64)
    teacher, names = ClosedSetHead.from_pretrained(parts / "backbone"), ["red", "blue"]
    images = [Image.open(parts / "data" / "images" / f"val{index}.png") for index in range(2)]
    rows = [{"image": image} for image in images]
    backbone = CspPanBackbone.from_pretrained(parts / "backbone").eval()
    expected = predict(model.eval(), processor, rows, names, nms_threshold=1).images
    for found, right in zip(
        nano_stages.stages(model, processor, backbone, teacher, images, names), expected, strict=True
    ):
        scores, labels, corners = found["decoder"]
        assert scores.std() > 0
        torch.testing.assert_close(scores, torch.as_tensor(right["scores"]).to(scores), rtol=0, atol=1e-5)
        torch.testing.assert_close(corners[0] * 64, torch.as_tensor(right["boxes"][0]).to(corners), rtol=0, atol=1e-2)
        assert labels[0].item() == right["labels"][0]


def test_the_teacher_reads_its_own_backbone(parts):
    torch.manual_seed(0)
    model, processor = nano.build(str(parts / "backbone"), str(parts / "text"), image_size=64)
    teacher, names = ClosedSetHead.from_pretrained(parts / "backbone"), ["red", "blue"]
    backbone = CspPanBackbone.from_pretrained(parts / "backbone").eval()
    images = [Image.open(parts / "data" / "images" / "val0.png")]

    def found():
        return next(nano_stages.stages(model.eval(), processor, backbone, teacher, images, names))

    before = found()
    with torch.no_grad():
        for parameter in model.model.backbone.parameters():
            parameter.mul_(2)
    after = found()
    assert torch.equal(before["teacher, suppressed"][0], after["teacher, suppressed"][0])
    assert not torch.equal(before["decoder"][0], after["decoder"][0])


def test_the_command_rates_every_stage(parts, tmp_path, capsys):
    nano.export(*nano.build(str(parts / "backbone"), str(parts / "text"), image_size=64), tmp_path)
    folders = ("--everyday", str(parts / "data"), "--backbone", str(parts / "backbone"), "--processor", str(tmp_path))
    nano_stages.main([str(tmp_path), *folders])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == list(nano_stages.IOU)
    assert all(0 <= figures["AP"] <= figures["AP50"] <= 1 for figures in found.values())
