"""A trunk that starts with the scores and boxes of a closed-set teacher, on small generated parts."""

import pytest
import torch
from PIL import Image

from gdino_hf.data.coco import read_coco
from gdino_hf.recipes import nano
from gdino_hf.recipes.closed_set_teacher import ClosedSetHead
from gdino_hf.recipes.nano_stages import name_scores
from gdino_hf.recipes.teacher_start import Directions, fit_boxes, start_from_teacher, start_with_scores

NAMES = ["red", "blue"]


def test_directions_leave_group_means_and_the_constant_alone():
    directions = Directions.of_width(128, 32)
    every = torch.cat((directions.offset[:, None] / 128**0.5, directions.signal, directions.means), dim=1)
    torch.testing.assert_close(every.T @ every, torch.eye(127).double())
    in_groups = directions.signal.unflatten(0, (32, 4))
    assert in_groups.sum(dim=1).abs().max() < 1e-12
    along = (in_groups * directions.offset.view(32, 4, 1)).sum(dim=1)
    assert along[:, :64].abs().max() < 1e-12
    assert along[:, 64:].abs().max() > 0.1
    with pytest.raises(ValueError, match="leaves 2 channels for each"):
        Directions.of_width(64, 32)


@pytest.fixture(scope="module")
def started(parts):
    """Model, processor, teacher, maps and pixels; the teacher's logits have a deviation of one around -5.5."""
    torch.manual_seed(0)
    model, processor = nano.build(str(parts / "backbone"), str(parts / "text"), image_size=64)
    rows = read_coco(parts / "data" / "train.json")
    pixels = processor.image_processor([rows[place]["image"] for place in range(12)], return_tensors="pt")[
        "pixel_values"
    ]
    with torch.no_grad():
        maps = model.model.backbone(pixels)
    layers = []
    for features in maps[:3]:
        weight = torch.randn(len(NAMES) + 4 * 3, 8)
        cells = features[:, -8:].transpose(0, 1).flatten(1)
        weight[:2] /= (weight[:2] @ (cells - cells.mean(dim=1, keepdim=True))).std(dim=1, keepdim=True)
        bias = torch.zeros(len(weight))
        bias[:2] = -5.5 - weight[:2] @ cells.mean(dim=1)
        layers.append((weight, bias))
    teacher = ClosedSetHead(layers, len(NAMES))
    start_with_scores(model, processor, teacher, maps, NAMES, ["green"])
    return model.eval(), processor, teacher, maps, pixels


@torch.no_grad()
def test_the_scores_are_the_teachers_behind_encoder_and_decoder(started):
    model, processor, teacher, maps, pixels = started
    inputs = processor(images=[Image.new("RGB", (64, 64))] * 12, text=[[*NAMES, "green"]] * 12)
    inputs["pixel_values"] = pixels
    outputs = model(**inputs, output_hidden_states=True)
    phrases = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).phrase_ids[0]
    wanted = teacher(maps)[0].logit()
    found = torch.stack([name_scores(each, phrases, 3) for each in outputs.enc_outputs_class])[:, : wanted.shape[1]]
    # Proposals at the border are not valid, and their features are zero.
    valid = outputs.enc_outputs_coord_logits[:, : wanted.shape[1]].isfinite().all(-1)
    difference = (found[..., :2].logit() - wanted)[valid]
    assert difference.square().mean().sqrt() < 0.1
    assert wanted[valid].std() > 0.9
    assert found[..., 2][valid].logit().max() < -3
    # Every decoder layer starts as a copy of the best proposals.
    best = name_scores(outputs.logits[0], phrases, 3)[:, :2].amax()
    assert best.logit().item() == pytest.approx(wanted[0][valid[0]].max().item(), abs=0.4)


def test_the_box_head_is_fitted_to_the_teachers_boxes(started):
    model, _, teacher, maps, _ = started
    told = []
    # This teacher's scores are low, so every cell is made to count.
    for level in range(3):
        teacher.get_buffer(f"bias{level}")[:2] += 5
    fit_boxes(model, teacher, [maps], 300, told.append)
    assert len(told) == 1
    assert float(told[0].split("GIoU of ")[1][:4]) > 0.6


def test_statistics_come_from_images_of_the_training_data(parts, capsys):
    torch.manual_seed(0)
    model, processor = nano.build(str(parts / "backbone"), str(parts / "text"), image_size=64)
    rows, teacher = read_coco(parts / "data" / "train.json"), ClosedSetHead.from_pretrained(parts / "backbone")
    start_from_teacher(model, processor, teacher, rows, NAMES, num_images=12, box_steps=5)
    assert "proposals start with a GIoU of 0." in capsys.readouterr().out
    assert model.training
    assert model.class_embed[0].bias.item() == -5.5
