"""Replay and weight interpolation, which limit forgetting, and what a run reports about it."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from gdino_hf import GDinoDataCollator, GDinoForObjectDetection
from gdino_hf.cli import main
from gdino_hf.data.coco import read_coco
from gdino_hf.data.reproducible_sampling import ReproducibleDataset, ReproducibleSampler
from gdino_hf.training.replay import ReplayCollator, RowsWithReplay, join_batches
from gdino_hf.training.weight_interpolation import initial_weights, interpolate_weights


@pytest.mark.parametrize(("share", "replayed"), [(0.25, 4), (0.5, 12), (0.01, 1)])
def test_an_epoch_has_every_new_row_once_and_the_share_of_replayed_rows(share, replayed):
    both = RowsWithReplay(list(range(12)), list(range(100)))
    sampler = ReproducibleSampler(len(both), seed=0, weights=both.weights(share))
    seen = set()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        rows = [visit.row for visit in sampler]
        new = sorted(row for row in rows if row < 12)
        assert new == list(range(12))
        assert len(rows) - 12 == replayed
        seen |= {row for row in rows if row >= 12}
    assert len(seen) > replayed


def test_new_and_replayed_rows_are_prompted_with_their_own_labels(drawn, tiny_processor):
    rows = ReproducibleDataset(RowsWithReplay(read_coco(drawn / "train.json"), read_coco(drawn / "val.json")))
    new = GDinoDataCollator(tiny_processor, labels=["cat", "dog"])
    old = GDinoDataCollator(tiny_processor, labels=["dog", "red hat", "cat"])
    batch = ReplayCollator(new, old)([rows[0], rows[12], rows[1]])
    assert batch["pixel_values"].shape[0] == len(batch["labels"]) == 3
    decoded = [tiny_processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"]]
    assert decoded == ["cat. dog.", "cat. dog.", "dog. red hat. cat."]
    assert batch["attention_mask"][0, -1] == 0
    assert batch["labels"][2]["class_labels"].tolist() == [2, 0]


def test_joined_batches_are_padded_at_the_right_and_the_bottom():
    first = {"pixel_values": torch.ones(1, 3, 2, 5), "image_sizes": [(2, 5)]}
    second = {"pixel_values": torch.ones(2, 3, 4, 3), "image_sizes": [(4, 3), (4, 3)]}
    joined = join_batches([first, second])
    assert joined["pixel_values"].shape == (3, 3, 4, 5)
    assert joined["pixel_values"][0, :, 2:].abs().sum() == 0
    assert joined["pixel_values"][1, :, :, 3:].abs().sum() == 0
    assert joined["pixel_values"].sum() == 3 * (2 * 5 + 2 * 4 * 3)
    assert joined["image_sizes"] == [(2, 5), (4, 3), (4, 3)]
    with pytest.raises(ValueError, match="cannot be joined"):
        join_batches([first, {"pixel_values": torch.ones(1, 3, 2, 2)}])


def test_interpolated_weights_lie_between_initial_and_trained_ones(tiny_model):
    model = copy.deepcopy(tiny_model)
    initial = initial_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    interpolate_weights(model, initial, 0.25)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, initial[name] + 0.75)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        interpolate_weights(model, initial, 1.5)
    with pytest.raises(ValueError, match="another model"):
        interpolate_weights(model, {}, 0.5)


def test_a_run_with_replay_interpolation_and_adapters_reports_what_was_forgotten(options, drawn, tiny_folder, tmp_path):
    against_forgetting = ["--replay", str(drawn), "--start-share", "0.5", "--zero-shot", str(drawn), "--lora-rank", "2"]
    assert main([*options, *against_forgetting, "--name", "careful", "--max_steps", "2"]) == 0
    run = tmp_path / "runs" / "train" / "careful"
    report = json.loads((run / "metrics.json").read_text())
    assert set(report["metrics"]) == {"before", "after", "zero_shot_before", "zero_shot_after"}
    assert report["parameters"]["text"]["trained"] == 0
    assert "mixed in (replay) to limit forgetting" in (run / "model" / "README.md").read_text()
    plain, tuned = (GDinoForObjectDetection.from_pretrained(place) for place in (tiny_folder, run / "model"))
    assert plain.state_dict().keys() == tuned.state_dict().keys()
    frozen = "model.text_backbone.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(plain.state_dict()[frozen], tuned.state_dict()[frozen])
    assert not torch.equal(
        plain.model.encoder_output_bbox_embed.layers[0].weight, tuned.model.encoder_output_bbox_embed.layers[0].weight
    )


def test_training_reports_the_same_metrics_as_gdino_eval(options, drawn, tmp_path):
    content = json.loads((drawn / "val.json").read_text())
    for place, item in enumerate(content["annotations"]):
        x, y, width, height = item["bbox"]
        # Areas of segments that differ from those of the boxes in size class, and boxes that reach beyond the image.
        item["area"] = [9.0, 1600.0][place % 2]
        item["bbox"] = [x - 20 * (x < 8), y, width, height]
    (drawn / "val.json").write_text(json.dumps(content))
    arguments = [*options, "--model", "nano", "--image-size", "64", "--max_steps", "1", "--name", "figures"]
    assert main([*arguments, "--eval_strategy", "steps", "--eval_steps", "1", "--zero-shot", str(drawn)]) == 0
    run = tmp_path / "runs" / "train" / "figures"
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    common = ["--runs", str(tmp_path / "runs"), "--model", str(run / "model"), "--name", "figures"]
    assert main(["eval", str(drawn / "val.json"), *common]) == 0
    judged = json.loads((tmp_path / "runs" / "eval" / "figures" / "metrics.json").read_text())["metrics"]
    assert judged["APs"] >= 0
    assert judged["APm"] >= 0
    assert metrics["after"] == pytest.approx(judged, abs=1e-6)
    assert metrics["zero_shot_after"] == metrics["after"]
    logged = json.loads((run / "checkpoint-1" / "trainer_state.json").read_text())["log_history"]
    assert next(line["eval_APm"] for line in logged if "eval_APm" in line) == pytest.approx(judged["APm"], abs=1e-6)


def test_the_finished_model_is_pushed_with_its_card(options, hub):
    pushed = ["--push_to_hub", "true", "--hub_model_id", "me/blood"]
    assert main([*options, *pushed, "--max_steps", "1", "--name", "pushed"]) == 0
    assert hub.repositories == ["blood"] or hub.repositories == ["me/blood"]
    card = hub.files["README.md"].decode()
    assert "## Fine-tuning" in card
    assert "metric" in card.partition("---\n")[2]
    # The card's example must work with the repository's name, because a reader has no folder "model".
    assert "\n# me/blood\n" in card
    assert card.count('from_pretrained("me/blood")') == 2
    assert '"model"' not in card
    assert "model.safetensors" in hub.files


def test_training_on_captions_reports_no_average_precision(options, drawn, tiny_folder, tmp_path):
    lines = []
    for index in range(8):
        # The red square on the left is a cat, the blue one on the right a dog.
        regions = [{"bbox": [0, 0, 32, 64], "phrase": "a cat", "tokens_positive": [[0, 5]]}]
        regions.append({"bbox": [32, 0, 64, 64], "phrase": "a dog", "tokens_positive": [[10, 15]]})
        grounding = {"caption": "a cat and a dog", "regions": regions}
        lines.append({"filename": f"train{index}.png", "height": 64, "width": 64, "grounding": grounding})
    place = tmp_path / "captions"
    place.mkdir()
    (place / "train.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    arguments = [*options[:1], str(place / "train.jsonl"), *options[2:], "--images", str(drawn / "images")]
    assert main([*arguments, "--max_steps", "2", "--name", "captions"]) == 0
    assert json.loads((tmp_path / "runs" / "train" / "captions" / "metrics.json").read_text())["metrics"] == {}
