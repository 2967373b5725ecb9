"""The recipe of gdino-nano, on small generated images and pretrained parts."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gdino_hf.data.coco import read_coco
from gdino_hf.recipes import nano
from gdino_hf.recipes.closed_set_teacher import DETECTOR_FILE, ClosedSetHead

NAMES = ["red", "blue"]
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_tokenizer):
    """Folders of a tiny image backbone, a tiny text encoder, and a data set of 12 training and 4 validation images."""
    from transformers import BertConfig, BertModel

    from gdino_hf.model.csp_pan import CspPanBackbone, CspPanConfig

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("parts")
    shape = {"stem_width": 8, "stage_widths": [8, 8, 8, 8], "stage_depths": [1, 1, 1, 1], "pan_width": 8}
    CspPanBackbone(CspPanConfig(**shape, head_features=True)).save_pretrained(folder / "backbone")
    rows = len(NAMES) + 4 * 3
    detector = {f"p{level}.weight": torch.randn(rows, 8) for level in (3, 4, 5)}
    detector |= {f"p{level}.bias": torch.zeros(rows) for level in (3, 4, 5)}
    save_file(detector, folder / "backbone" / DETECTOR_FILE, {"num_classes": str(len(NAMES))})
    text_config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=256,
    )
    BertModel(text_config).save_pretrained(folder / "text")
    tiny_tokenizer.save_pretrained(folder / "text")
    rng = random.Random(0)
    (folder / "data" / "images").mkdir(parents=True)
    for split, count in (("train", 12), ("val", 4)):
        content = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in enumerate(NAMES)]}
        for index in range(count):
            name, x, y = NAMES[index % 2], rng.randrange(40), rng.randrange(40)
            pixels = np.full((64, 64, 3), 128, dtype=np.uint8)
            pixels[y : y + 24, x : x + 24] = COLOURS[name]
            file_name = f"{split}{index}.png"
            Image.fromarray(pixels).save(folder / "data" / "images" / file_name)
            content["images"].append({"id": index, "file_name": file_name, "width": 64, "height": 64})
            content["annotations"].append(
                {
                    "id": index + 1,
                    "image_id": index,
                    "category_id": NAMES.index(name),
                    "bbox": [x, y, 24, 24],
                    "area": 576,
                    "iscrowd": 0,
                }
            )
        (folder / "data" / f"{split}.json").write_text(json.dumps(content))
    return folder


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
