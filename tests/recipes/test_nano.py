"""Claims about the recipe of gdino-nano, on photographs and pretrained parts made on the spot."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gdino_hf.recipes import nano
from gdino_hf.recipes.closed_set_teacher import DETECTOR_FILE
from gdino_hf.training import time_budget

NAMES = ["red", "blue"]
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_tokenizer):
    """Folders of a tiny image backbone, a tiny text encoder, and a data set of 12 and 4 photographs."""
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


def test_schedule_rises_stays_and_falls():
    factors = [nano.learning_rate(fraction) for fraction in (0.0, 0.01, 0.02, 0.3, 0.5, 0.755, 1.0)]
    assert factors == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, 0.5002, 0.02])


def test_clock_goes_on_where_it_was(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time_budget.time, "monotonic", lambda: now[0])
    clock = time_budget.Clock(minutes=10)
    clock.start()
    now[0] += 150
    clock.tick()
    assert clock.fraction == pytest.approx(0.25)
    clock.save(tmp_path)
    now[0] += 1000
    again = time_budget.Clock(minutes=10)
    again.load(tmp_path)
    assert again.fraction == pytest.approx(0.25)
    again.start()
    now[0] += 1000
    again.tick()
    assert again.fraction == 1.0


def test_a_run_goes_on_from_its_last_whole_checkpoint(tmp_path):
    model = torch.nn.Linear(1, 1, bias=False)
    run, last = nano.timed_run(model, tmp_path, minutes=10)
    assert last is None
    args, control = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace()
    for step in (9, 10, 11):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        model.weight.data.fill_(step)
        run.on_step_end(args, SimpleNamespace(global_step=step), control)
        if step < 11:
            run.on_save(args, SimpleNamespace(global_step=step), control)
            kept = run.average.weights["weight"].clone()
    again, last = nano.timed_run(model, tmp_path, minutes=10)
    assert last == tmp_path / "checkpoint-10"
    assert torch.equal(again.average.weights["weight"], kept)


def test_repeated_rows_appear_by_their_factors():
    rows = nano.Repeated(list("abcd"), [1.0, 2.0, 1.0, 3.0], seed=0)
    assert "".join(rows[index] for index in range(len(rows))) == "abbcddd"
    assert 120 < len(nano.Repeated([0] * 100, [1.5] * 100, seed=0)) < 180


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
    assert {"loss_ce", "loss_bbox_enc", "loss_giou_dn", "dense_ce", "dense_giou"} <= lines()[-1].keys()

    # The minutes are used up: the same command measures again and trains no more.
    third = nano.train(arguments(parts, tmp_path, minutes=first["minutes"] + 0.05))
    assert (third["steps"], third["AP"]) == (second["steps"], second["AP"])

    model = GDinoForObjectDetection.from_pretrained(tmp_path / "export")
    processor = GDinoProcessor.from_pretrained(tmp_path / "export")
    assert model.dtype == torch.float32
    backbone = CspPanBackbone.from_pretrained(parts / "backbone").state_dict()
    trained = model.model.backbone.conv_encoder.model.state_dict()
    for name, weight in backbone.items():
        # Frozen, and only rounded to float16.
        assert torch.equal(trained[name].half(), weight.half()), name
    picture = Image.open(parts / "data" / "images" / "val0.png")
    inputs = processor(images=picture, text=NAMES)
    assert inputs["pixel_values"].shape[-2:] == (64, 64)
    with torch.no_grad():
        assert model.eval()(**inputs.to(model.device)).pred_boxes.shape == (1, 100, 4)


def test_another_list_of_names_than_the_teachers_is_refused(parts, tmp_path):
    content = json.loads((parts / "data" / "train.json").read_text())
    content["categories"].append({"id": 2, "name": "green"})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text(json.dumps(content))
    (tmp_path / "data" / "images").symlink_to(parts / "data" / "images")
    wrong = arguments(parts, tmp_path / "run", minutes=1)
    wrong.data = str(tmp_path / "data")
    with pytest.raises(ValueError, match="2 classes but train"):
        nano.train(wrong)


def test_no_folder_of_this_machine_is_written_down(parts):
    model, _ = nano.build(str(parts / "backbone"), str(parts / "text"), image_size=64)
    assert str(parts) not in model.config.to_json_string()


def test_only_the_trunk_is_trained(parts):
    model, _ = nano.build(str(parts / "backbone"), str(parts / "text"), image_size=64)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert all(name.startswith(("model.backbone.", "model.text_backbone.")) for name in frozen)
    assert all(not p.requires_grad for part in nano.frozen_parts(model) for p in part.parameters())
    assert model.model.text_projection.weight.requires_grad
