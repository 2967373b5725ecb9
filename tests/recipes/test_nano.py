"""The recipe of gdino-nano, on small generated images and pretrained parts."""

import json

import pytest
import torch
from PIL import Image

from gdino_hf.data.coco import read_coco
from gdino_hf.recipes import nano
from gdino_hf.recipes.closed_set_teacher import ClosedSetHead

NAMES = ["red", "blue"]


def arguments(parts, output, minutes):
    return nano.parse_arguments(
        [
            *("--data", str(parts / "data"), "--backbone", str(parts / "backbone"), "--text", str(parts / "text")),
            *("--output", str(output), "--export", str(output / "export"), "--minutes", str(minutes)),
            *("--image-size", "64", "--batch-size", "4", "--least-labels", "1", "--most-labels", "2"),
        ]
    )


@pytest.fixture
def trainer(parts, tmp_path):
    """The recipe's trainer, set up as `train` does."""
    args = arguments(parts, tmp_path, minutes=1)
    model, processor = nano.build(args.backbone, args.text, args.image_size)
    teacher = ClosedSetHead.from_pretrained(args.backbone)
    return nano.make_trainer(args, model, processor, teacher, read_coco(parts / "data" / "train.json"), NAMES)


def test_schedule_rises_stays_level_and_falls(trainer):
    trainer.create_optimizer_and_scheduler(num_training_steps=trainer.args.max_steps)
    factors = []
    for fraction in (0.0, 0.01, 0.02, 0.3, 0.5, 0.755, 1.0):
        trainer.time_budget.tick(60 * fraction)
        factors.append(trainer.lr_scheduler.lr_lambdas[0](0))
    assert factors == pytest.approx([0.02, 0.51, 1.0, 1.0, 1.0, 0.5002, 0.02])


def test_rare_names_are_sampled_more_often(parts, tmp_path):
    args = arguments(parts, tmp_path, minutes=1)
    # Each of the two names is on half of the photographs, so with a threshold of 1 both count as rare.
    args.rare = 1.0
    model, processor = nano.build(args.backbone, args.text, args.image_size)
    teacher = ClosedSetHead.from_pretrained(args.backbone)
    trainer = nano.make_trainer(args, model, processor, teacher, read_coco(parts / "data" / "train.json"), NAMES)
    trainer.get_train_dataloader()
    # 12 photographs times sqrt(2), filled up to whole batches of 4.
    assert len(trainer.sampler) == 20


def test_a_start_whose_backbone_was_trained_is_refused(parts, tmp_path):
    args = arguments(parts, tmp_path / "run", minutes=1)
    model, processor = nano.build(args.backbone, args.text, args.image_size)
    with torch.no_grad():
        next(model.model.backbone.conv_encoder.model.parameters()).mul_(1.1)
    nano.export(model, processor, tmp_path / "start")
    args.start = str(tmp_path / "start")
    with pytest.raises(ValueError, match=r"start was trained further than that of .*; continue with gdino_hf\.recipes"):
        nano.train(args)


@pytest.mark.slow
def test_trains_resumes_measures_and_exports(parts, tmp_path):
    from gdino_hf.model.csp_pan import CspPanBackbone
    from gdino_hf.model.modeling_gdino import GDinoForObjectDetection
    from gdino_hf.model.processing_gdino import GDinoProcessor

    def lines():
        return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]

    first = nano.train(arguments(parts, tmp_path, minutes=0.05))
    assert first["steps"] > 0
    assert 0.05 <= first["minutes"] < 0.5
    assert {"AP", "AP50"} <= json.loads((tmp_path / "figures.json").read_text()).keys()

    second = nano.train(arguments(parts, tmp_path, minutes=first["minutes"] + 0.05))
    assert second["steps"] > first["steps"]
    assert second["minutes"] >= first["minutes"] + 0.05
    steps = [line["step"] for line in lines()]
    assert steps == sorted(steps)
    losses = [line for line in lines() if "loss" in line]
    assert {"loss_ce", "loss_bbox_enc", "loss_giou_dn", "dense_ce", "dense_giou", "minutes"} <= losses[-1].keys()

    # The time budget is used up: the same command measures again without further training.
    third = nano.train(arguments(parts, tmp_path, minutes=first["minutes"] + 0.05))
    assert (third["steps"], third["AP"]) == (second["steps"], second["AP"])

    model = GDinoForObjectDetection.from_pretrained(tmp_path / "export")
    processor = GDinoProcessor.from_pretrained(tmp_path / "export")
    assert model.dtype == torch.float32
    backbone = CspPanBackbone.from_pretrained(parts / "backbone").state_dict()
    trained = model.model.backbone.conv_encoder.model.state_dict()
    for name, weight in backbone.items():
        # The backbone is frozen, so its weights are only rounded to float16.
        assert torch.equal(trained[name].half(), weight.half()), name
    picture = Image.open(parts / "data" / "images" / "val0.png")
    inputs = processor(images=picture, text=NAMES)
    assert inputs["pixel_values"].shape[-2:] == (64, 64)
    with torch.no_grad():
        assert model.eval()(**inputs.to(model.device)).pred_boxes.shape == (1, 100, 4)


def test_names_that_differ_from_the_teachers_are_refused(parts, tmp_path):
    content = json.loads((parts / "data" / "train.json").read_text())
    content["categories"].append({"id": 2, "name": "green"})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text(json.dumps(content))
    (tmp_path / "data" / "images").symlink_to(parts / "data" / "images")
    wrong = arguments(parts, tmp_path / "run", minutes=1)
    wrong.data = str(tmp_path / "data")
    with pytest.raises(ValueError, match="2 classes but train"):
        nano.train(wrong)


def test_the_config_does_not_name_folders_of_the_parts(parts):
    model, _ = nano.build(str(parts / "backbone"), str(parts / "text"), image_size=64)
    assert str(parts) not in model.config.to_json_string()


def test_only_the_trunk_is_trained(trainer):
    names = {name: parameter.requires_grad for name, parameter in trainer.model.named_parameters()}
    frozen = {name for name, requires_grad in names.items() if not requires_grad}
    assert frozen
    assert all(name.startswith(("model.backbone.", "model.text_backbone.")) for name in frozen)
    assert not any(names[name] for name in names if name.startswith(("model.backbone.", "model.text_backbone.")))
    assert names["model.text_projection.weight"]
