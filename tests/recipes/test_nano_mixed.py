"""The recipe that trains gdino-nano further on two data sets, on small generated images and pretrained parts."""

import functools
import json
import random

import pytest
import torch

from gdino_hf import NANO
from gdino_hf.model.csp_pan import CspPanBackbone
from gdino_hf.model.image_processing_gdino import GDinoImageProcessor
from gdino_hf.model.modeling_gdino import GDinoForObjectDetection
from gdino_hf.model.processing_gdino import GDinoProcessor
from gdino_hf.recipes import nano_mixed, nano_rating, nano_rows, pasted_objects, region_names
from gdino_hf.recipes.closed_set_teacher import ClosedSetHead
from gdino_hf.recipes.nano_rows import read_rows
from gdino_hf.training.saving import last_checkpoint
from recipes.small_efficientnet import small_weights


def arguments(parts, start, output, *more):
    return nano_mixed.parse_arguments(
        [
            *("--everyday", str(parts / "data"), "--wild", str(parts / "wild"), "--start", str(start)),
            *("--backbone", str(parts / "backbone"), "--output", str(output), "--batch-size", "4"),
            *("--least-labels", "1", "--most-labels", "3", "--warmup-steps", "2", "--decay-steps", "2"),
            *("--hold-out", "0", *more),
        ]
    )


def trainer_of(args):
    model = GDinoForObjectDetection.from_pretrained(args.start)
    return nano_mixed.make_trainer(args, model, GDinoProcessor.from_pretrained(args.start))


def test_the_loss_adds_the_teachers_terms_with_their_weights(parts, start, tmp_path):
    args = arguments(parts, start, tmp_path, "--teacher-weight", "3", "--set-weight", "5")
    trainer = trainer_of(args)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, terms, outputs = trainer.detection_loss(trainer.model, batch)
    config = trainer.model.config
    expected = outputs.loss
    for name, weight in (("dense", 3), ("set", 5)):
        assert terms[f"{name}_ce"] > 0
        expected = expected + weight * config.class_loss_coefficient * terms[f"{name}_ce"]
        expected = expected + config.bbox_loss_coefficient * terms[f"{name}_bbox"]
        expected = expected + config.giou_loss_coefficient * terms[f"{name}_giou"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_pasted_objects_reach_the_batches(parts, start, tmp_path, monkeypatch):
    # The squares are small.
    monkeypatch.setattr(pasted_objects, "SMALLEST", 8)

    def boxes(share):
        args = arguments(parts, start, tmp_path, "--paste", share, "--wild-share", "0")
        batches = list(trainer_of(args).get_train_dataloader())
        return [len(labels["boxes"]) for batch in batches[:3] for labels in batch["labels"]]

    without, everywhere = boxes("0"), boxes("1")
    # Each photograph has one square.
    assert max(without) == 1
    assert max(everywhere) > 2
    assert sum(everywhere) > 1.5 * sum(without)


def test_each_batch_has_one_of_the_sizes_and_the_exported_size_stays(parts, start, tmp_path):
    args = arguments(parts, start, tmp_path, "--image-sizes", "32", "96")
    model, processor = GDinoForObjectDetection.from_pretrained(args.start), GDinoProcessor.from_pretrained(args.start)
    trainer = nano_mixed.make_trainer(args, model, processor)
    assert processor.image_processor.size == {"height": 64, "width": 64}
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape == (4, 3, 96, 96)
    cells = set()
    for trainer.state.global_step in range(8):
        loss, _, _ = trainer.detection_loss(trainer.model, batch)
        assert torch.isfinite(loss)
        cells.add(tuple(tuple(x.shape[-2:]) for x in trainer._maps))
    # Strides of 8, 16 and 32 pixels.
    assert cells == {((4, 4), (2, 2), (1, 1)), ((12, 12), (6, 6), (3, 3))}
    seen = []
    for repeat in range(2):
        random.seed(repeat)
        for trainer.state.global_step in range(8):
            seen.append(trainer._at_a_size(batch)["pixel_values"].shape[-1])
    assert seen[:8] == seen[8:]
    assert set(seen) == {32, 96}
    trainer.image_sizes = [96]
    at_96 = trainer.detection_loss(trainer.model, batch)[0]
    trainer.image_sizes = []
    torch.testing.assert_close(trainer.detection_loss(trainer.model, batch)[0], at_96)


def test_sizes_that_the_backbone_cannot_divide_are_refused(parts, start, tmp_path, capsys):
    for sizes in (["320", "330"], ["0"]):
        with pytest.raises(SystemExit):
            arguments(parts, start, tmp_path, "--image-sizes", *sizes)
        assert "must be multiples of 32" in capsys.readouterr().err


def test_names_left_out_do_not_make_a_photograph_rare(parts, start, tmp_path):
    image_processor = GDinoProcessor.from_pretrained(start).image_processor
    every = read_rows(arguments(parts, start, tmp_path), image_processor).weighing
    assert any("blue" in names for names in every)
    kept = read_rows(arguments(parts, start, tmp_path, "--without", "blue"), image_processor).weighing
    assert kept == [[name for name in names if name != "blue"] for names in every]


def test_mosaics_hold_no_left_out_names_and_no_photographs_that_are_kept_back(parts, start, tmp_path):
    args = arguments(parts, start, tmp_path, "--mosaic", "1", "--without", "cat", "--hold-out", "3")
    trainer = trainer_of(args)
    together = trainer.data_collator.transform.transforms[0]
    assert together.places == [place for place in range(12) if place % 3]
    assert "cat" not in together.names
    rows = trainer.train_dataset
    for place in range(12):
        made = together(rows[place], random.Random(place))
        assert made is not rows[place]
        assert "cat" not in {*made["names"], *made["neg_names"]}


def test_rows_of_both_sets_are_drawn_by_share(parts, start, tmp_path):
    trainer = trainer_of(arguments(parts, start, tmp_path, "--wild-share", "0.5", "--rare", "0"))
    trainer.get_train_dataloader()
    rows = [key.row for key in trainer.sampler]
    assert len(rows) == 20  # 12 and 6 photographs, filled up to whole batches of 4
    assert sum(row >= 12 for row in rows[:18]) == 9


@pytest.mark.parametrize("factor", [0.0, 0.1])
def test_backbone_is_trained_only_with_a_learning_rate_and_the_teacher_keeps_its_own(parts, start, tmp_path, factor):
    trainer = trainer_of(arguments(parts, start, tmp_path, "--backbone-lr-factor", str(factor)))
    trained = {name.split(".")[1] for name, x in trainer.model.named_parameters() if x.requires_grad}
    assert ("backbone" in trained) == (factor > 0)
    assert "text_backbone" not in trained
    trainer.create_optimizer()
    rates = {group["group"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates["trunk"] == 5e-5
    assert rates.get("backbone", 0.0) == pytest.approx(5e-5 * factor)
    if factor:
        pixels = torch.randn(1, 3, 64, 64)
        before = [x.clone() for x in trainer.teacher_maps(pixels)]
        with torch.no_grad():
            for parameter in trainer.model.model.backbone.parameters():
                parameter.mul_(2)
        after = trainer.model.model.backbone(pixels)
        assert not torch.equal(after[0], before[0])
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.teacher_maps(pixels), strict=True))


def test_the_teacher_reads_its_own_backbone_when_the_start_has_another(parts, start, tmp_path):
    args = arguments(parts, start, tmp_path)
    model = GDinoForObjectDetection.from_pretrained(args.start)
    pixels = torch.randn(1, 3, 64, 64)
    shared = nano_mixed.make_trainer(args, model, GDinoProcessor.from_pretrained(args.start))
    assert shared._teacher_backbone is None
    with torch.no_grad():
        own = model.eval().model.backbone.conv_encoder.model(pixels).feature_maps
        for parameter in model.model.backbone.parameters():
            parameter.mul_(2)
    trainer = nano_mixed.make_trainer(args, model, GDinoProcessor.from_pretrained(args.start))
    # The start is stored in float16.
    for found, expected in zip(trainer.teacher_maps(pixels), own, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


def test_names_left_out_are_neither_asked_nor_taught(parts, start, tmp_path):
    trainer = trainer_of(arguments(parts, start, tmp_path, "--without", "blue", "--hold-out", "0"))
    assert set(trainer.classes.values()) == {0}
    asked = {label for batch in trainer.get_train_dataloader() for prompt in batch["text"] for label in prompt}
    assert any("red" in label for label in asked)
    assert not any("blue" in label for label in asked)


def test_regions_get_names_that_nobody_annotated(parts, start, tmp_path, monkeypatch, capsys, caplog):
    # Random weights are sure of nothing.
    for limit in ("MIN_SCORE", "POSSIBLE"):
        monkeypatch.setattr(region_names, limit, 0.0)
    monkeypatch.setattr(region_names, "HALF", -1.0)
    weights = small_weights(1000)
    torch.save(weights, tmp_path / "lite.pth")
    # Class 5 is called "blue", and none is called "red".
    lines = [f"  {index}: '{'blue' if index == 5 else f'thing {index}'}'," for index in range(1000)]
    (tmp_path / "names.js").write_text("\n".join(lines))
    files = ("--region-classifier", str(tmp_path / "lite.pth"), "--region-class-names", str(tmp_path / "names.js"))
    model = ("--region-model", str(start))
    args = arguments(parts, start, tmp_path, "--without", "blue,red", "--reworded", "0", *model, *files)
    trainer = trainer_of(args)
    assert "No class of ImageNet is called red; no region gets these names." in caplog.text
    boxed, asked = set(), set()
    for batch in trainer.get_train_dataloader():
        for prompt, target in zip(batch["text"], batch["labels"], strict=True):
            asked.update(prompt)
            boxed |= {prompt[label] for label in target["class_labels"].tolist()}
    assert "blue" in boxed
    assert "red" not in asked
    looked = json.loads((tmp_path / "regions.json").read_text())["found"]
    assert len(looked) == 18
    assert {region[0] for row in looked for region in row["regions"]} == {"blue"}
    # Photographs with probable regions are drawn more often, and the name counts among the rare ones.
    path = tmp_path / "regions.json"
    kept = json.loads(path.read_text())
    for place in (0, 1, 13):
        kept["found"][place]["regions"] = []
    path.write_text(json.dumps(kept))
    found = read_rows(args, GDinoProcessor.from_pretrained(start).image_processor)
    assert found.factors == [1.0 if place in (0, 1, 13) else region_names.DRAWN_MORE for place in range(18)]
    assert ["region blue" in names for names in found.weighing] == [place not in (0, 1, 13) for place in range(18)]
    with monkeypatch.context() as context:
        # A name on fewer photographs tells nothing about how rare they are.
        context.setattr(nano_rows, "COMMON", 16)
        rarer = read_rows(args, GDinoProcessor.from_pretrained(start).image_processor)
    assert rarer.factors == found.factors
    assert not any("region blue" in names for names in rarer.weighing)
    drawn = trainer_of(args).row_weights
    assert drawn[2] / drawn[0] == pytest.approx(region_names.DRAWN_MORE)
    assert sum(drawn) == pytest.approx(18)
    # Other names that are left out make other regions, and so do other weights.
    with pytest.raises(ValueError, match=r"regions\.json is about other photographs or was made with other settings"):
        trainer_of(arguments(parts, start, tmp_path, "--without", "blue", *model, *files))
    (tmp_path / "teacher_on_wild.json").unlink()
    with pytest.raises(ValueError, match=r"regions\.json is about other photographs or was made with other settings"):
        read_rows(args, GDinoImageProcessor(size={"height": 96, "width": 96}))
    (tmp_path / "teacher_on_wild.json").unlink()
    # A model in half precision has other weights, and is computed in float32.
    GDinoForObjectDetection.from_pretrained(start).bfloat16().save_pretrained(tmp_path / "half")
    GDinoProcessor.from_pretrained(start).save_pretrained(tmp_path / "half")
    half = ("--region-model", str(tmp_path / "half"))
    with pytest.raises(ValueError, match=r"regions\.json is about other photographs or was made with other settings"):
        trainer_of(arguments(parts, start, tmp_path, "--without", "blue,red", "--reworded", "0", *half, *files))
    torch.save({**weights, "_fc.weight": weights["_fc.weight"] + 1}, tmp_path / "lite.pth")
    with pytest.raises(ValueError, match=r"regions\.json is about other photographs or was made with other settings"):
        trainer_of(args)
    (tmp_path / "names.js").write_text("\n".join(lines[:5]))
    with pytest.raises(ValueError, match="lists 5 classes"):
        trainer_of(args)
    (tmp_path / "names.js").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="No class of ImageNet is called red; leave out other names, or train without"):
        trainer_of(arguments(parts, start, tmp_path, "--without", "red", *model, *files))
    torch.save(small_weights(5), tmp_path / "lite.pth")
    with pytest.raises(ValueError, match=r"lite\.pth knows 5 classes, ImageNet has 1000"):
        trainer_of(args)
    nano_mixed.keep_options(args)
    with pytest.raises(ValueError, match="began with region_model=given, not None"):
        nano_mixed.keep_options(arguments(parts, start, tmp_path, "--without", "blue,red", "--reworded", "0"))
    for some in (files, model, (*model, *files[:2])):
        with pytest.raises(SystemExit):
            arguments(parts, start, tmp_path, *some)
        assert "go together" in capsys.readouterr().err


def test_an_untrained_trunk_keeps_the_pretrained_parts_and_knows_the_other_classes(parts, start, tmp_path):
    args = arguments(parts, start, tmp_path, "--without", "blue", "--untrained")
    old = GDinoForObjectDetection.from_pretrained(args.start)
    with torch.no_grad():
        old.model.level_embed.fill_(7.0)
        for parameter in old.model.backbone.parameters():
            parameter.mul_(2)
    new = nano_mixed.untrained(args, old, GDinoProcessor.from_pretrained(args.start))
    own, other = new.state_dict(), old.state_dict()
    text = [name for name in own if name.startswith("model.text_backbone.")]
    assert all(torch.equal(own[name], other[name]) for name in text)
    # The start's backbone may have learned what is left out.
    image = CspPanBackbone.from_pretrained(args.backbone).state_dict()
    assert all(torch.equal(own[f"model.backbone.conv_encoder.model.{name}"], value) for name, value in image.items())
    assert own["model.level_embed"].abs().max() < 7
    assert new.training


def test_a_trunk_that_starts_with_the_teachers_scores_is_trained_without_denoising(
    parts, start, tmp_path, monkeypatch, capsys
):
    # The fit of boxes takes minutes with its own number of steps.
    short = functools.partial(nano_mixed.start_from_teacher, num_images=12, box_steps=2)
    monkeypatch.setattr(nano_mixed, "start_from_teacher", short)
    trainer = nano_mixed.train(
        arguments(parts, start, tmp_path, "--untrained", "--teacher-start", "--without", "blue", "--steps", "1")
    )
    assert trainer.model.config.num_denoising_queries == 0
    assert trainer.model.class_embed[0].bias.item() == pytest.approx(-5.5, abs=1e-3)
    with pytest.raises(SystemExit):
        arguments(parts, start, tmp_path, "--teacher-start")
    assert "give --untrained as well" in capsys.readouterr().err


def test_encoder_and_branches_have_learning_rates_of_their_own(parts, start, tmp_path):
    options = ("--encoder-lr-factor", "0.1", "--branch-lr-factor", "0.2")
    trainer = trainer_of(arguments(parts, start, tmp_path, *options))
    trainer.create_optimizer()
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    rates = {names[x]: group["lr"] for group in trainer.optimizer.param_groups for x in group["params"]}
    assert rates["model.encoder.layers.0.deformable_layer.fc1.weight"] == pytest.approx(5e-6)
    assert rates["model.encoder.layers.0.deformable_layer.fc2.weight"] == pytest.approx(1e-6)
    assert rates["model.decoder.layers.0.fc2.weight"] == pytest.approx(1e-5)
    assert rates["model.decoder.layers.0.fc1.weight"] == pytest.approx(5e-5)
    assert len(rates) == sum(x.requires_grad for x in trainer.model.parameters())


def test_the_decoder_can_be_trained_alone(parts, start, tmp_path):
    trainer = trainer_of(arguments(parts, start, tmp_path, "--decoder-only"))
    trained = {name.split(".")[1] for name, x in trainer.model.named_parameters() if x.requires_grad and name[0] == "m"}
    assert trained == {"decoder", "encoder_output_bbox_embed"}


def test_the_teachers_classes_can_be_chosen(parts):
    teacher = ClosedSetHead.from_pretrained(parts / "backbone")
    maps = [torch.randn(1, 8, size, size) for size in (8, 4, 2)]
    scores, boxes = teacher(maps)
    chosen_scores, chosen_boxes = teacher.of_classes([1])(maps)
    torch.testing.assert_close(chosen_scores, scores[..., 1:])
    torch.testing.assert_close(chosen_boxes, boxes)


def test_schedule_rises_stays_level_and_falls_by_steps(parts, start, tmp_path):
    trainer = trainer_of(arguments(parts, start, tmp_path, "--steps", "10"))
    trainer.create_optimizer_and_scheduler(num_training_steps=trainer.args.max_steps)
    factors = [trainer.lr_scheduler.lr_lambdas[0](step) for step in (0, 1, 2, 8, 9, 10)]
    assert factors == pytest.approx([0.02, 0.51, 1.0, 1.0, 0.51, 0.02])


@pytest.mark.parametrize("option", ["--wild-share", "--rare", "--reworded", "--mosaic", "--paste"])
def test_a_share_above_one_is_refused(parts, start, tmp_path, option, capsys):
    with pytest.raises(SystemExit):
        arguments(parts, start, tmp_path, option, "1.5")
    assert f"{option} is 1.5; it must lie in 0..1" in capsys.readouterr().err


def test_a_run_with_other_options_is_refused(parts, start, tmp_path):
    nano_mixed.keep_options(arguments(parts, start, tmp_path))
    nano_mixed.keep_options(arguments(parts, start, tmp_path, "--steps", "7"))
    with pytest.raises(ValueError, match=r"began with wild_share=0\.4, not 0\.2"):
        nano_mixed.keep_options(arguments(parts, start, tmp_path, "--wild-share", "0.2"))


@pytest.mark.slow
def test_a_run_at_another_size_is_rated_at_that_size(parts, start, tmp_path):
    run = tmp_path / "run"
    nano_mixed.train(arguments(parts, start, run, "--steps", "2", "--image-size", "96"))
    for folder in (run, last_checkpoint(run)):
        _, processor = nano_rating.told_model(nano_rating.model_parser("").parse_args([str(folder)]))
        assert dict(processor.image_processor.size) == {"height": 96, "width": 96}
    _, processor = nano_rating.told_model(nano_rating.model_parser("").parse_args(["nano"]))
    assert dict(processor.image_processor.size) == dict(GDinoProcessor.from_pretrained(NANO).image_processor.size)


def test_trains_resumes_and_every_checkpoint_can_be_rated(parts, start, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    nano_mixed.train(arguments(parts, start, run, "--steps", "3"))
    assert last_checkpoint(run).name == "checkpoint-3"
    trainer = nano_mixed.train(arguments(parts, start, run, "--steps", "5", "--export", str(tmp_path / "export")))
    assert trainer.state.global_step == 5
    assert trainer.model.model.text_feature_cache.encoded > 0

    averaged = trainer.model.state_dict()
    rated = nano_rating.load_checkpoint(run).state_dict()
    assert all(torch.equal(averaged[name], rated[name]) for name in averaged)
    exported = nano_rating.load_checkpoint(tmp_path / "export").state_dict()
    torch.testing.assert_close(exported["model.level_embed"], averaged["model.level_embed"], rtol=1e-3, atol=1e-4)

    sets = ("--everyday", str(parts / "data"), "--wild", str(parts / "wild"), "--processor", str(start))
    capsys.readouterr()
    nano_rating.main([str(run), *sets])
    figures = json.loads(capsys.readouterr().out)
    assert figures.keys() == {"everyday/val", "wild/val"}
    assert all(0 <= figures[title]["AP"] <= figures[title]["AP50"] <= 1 for title in figures)

    # Another run starts from the averaged weights, which are not those of the last step.
    monkeypatch.setattr(nano_mixed, "train_to_the_end", lambda trainer: None)
    begun = nano_mixed.train(arguments(parts, run, tmp_path / "next")).model.state_dict()
    assert all(torch.equal(averaged[name], begun[name]) for name in averaged)
    last = GDinoForObjectDetection.from_pretrained(run / "checkpoint-5").state_dict()
    assert not all(torch.equal(averaged[name], last[name]) for name in averaged)
