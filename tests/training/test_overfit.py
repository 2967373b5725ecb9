"""The stock Trainer overfits eight photographs; a short run shows that it learns."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import Trainer, TrainingArguments

from gdino_hf import NANO, GDinoDataCollator, GDinoForObjectDetection, GDinoProcessor
from gdino_hf.data.coco import read_coco
from gdino_hf.evaluation.coco_results import average_precision, detect_coco


def train(model, processor, rows, names, folder, **options):
    """Train with the stock Trainer on a CPU, and return what it logged."""
    settings = {"remove_unused_columns": False, "save_strategy": "no", "report_to": [], "use_cpu": True}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), disable_tqdm=True, seed=0, **settings, **options),
        train_dataset=rows,
        data_collator=GDinoDataCollator(processor, labels=names),
    )
    trainer.train()
    return trainer.state.log_history


def test_the_loss_falls_to_a_fraction(tiny_model, tiny_processor, drawn, tmp_path):
    rows = read_coco(drawn / "train.json").select(range(4))
    options = {"per_device_train_batch_size": 4, "max_steps": 12, "learning_rate": 1e-3, "logging_steps": 1}
    log = train(copy.deepcopy(tiny_model), tiny_processor, rows, ["cat", "dog"], tmp_path, **options)
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 12
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.training
def test_overfits_eight_photographs(shared, tmp_path):
    source = shared / "data" / "everyday" / "train.json"
    content = json.loads(source.read_text())
    boxes = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        boxes[annotation["image_id"]].append(annotation)
    chosen = [
        image
        for image in content["images"]
        if 1 <= len(boxes[image["id"]]) <= 5
        and not any(item.get("iscrowd") for item in boxes[image["id"]])
        and min(min(item["bbox"][2:]) for item in boxes[image["id"]]) > 40
    ][:8]
    annotations = [item for image in chosen for item in boxes[image["id"]]]
    used = {item["category_id"] for item in annotations}
    categories = [category for category in content["categories"] if category["id"] in used]
    eight = tmp_path / "eight.json"
    eight.write_text(json.dumps({"images": chosen, "annotations": annotations, "categories": categories}))
    images = source.parent / "images"

    torch.manual_seed(0)
    processor = GDinoProcessor.from_pretrained(NANO)
    model = GDinoForObjectDetection.from_pretrained(NANO)
    model.model.text_backbone.requires_grad_(False)
    # Start with untrained heads, so that the accuracy comes from this training.
    fresh = GDinoForObjectDetection(model.config)
    for name in ("bbox_embed", "class_embed"):
        getattr(model, name).load_state_dict(getattr(fresh, name).state_dict())
    model.model.encoder_output_bbox_embed.load_state_dict(fresh.model.encoder_output_bbox_embed.state_dict())
    before = average_precision(eight, detect_coco(model, processor, eight, images))["AP50"]
    assert before < 0.5
    names = [category["name"] for category in categories]
    options = {"per_device_train_batch_size": 8, "max_steps": 90, "warmup_steps": 5, "max_grad_norm": 1.0}
    schedule = {"learning_rate": 4e-4, "lr_scheduler_type": "cosine"}
    train(model, processor, read_coco(eight, images), names, tmp_path, **options, **schedule)
    after = average_precision(eight, detect_coco(model, processor, eight, images))["AP50"]
    assert after > 0.9
