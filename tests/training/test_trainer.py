"""GDinoTrainer: learning rates per group, freezing, EMA, time budget, adapters, precision and memory savers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from gdino_hf import GDinoDataCollator, GDinoForObjectDetection
from gdino_hf.data.coco import category_names, read_coco
from gdino_hf.data.reproducible_sampling import ReproducibleDataset
from gdino_hf.training.arguments import GDinoTrainingArguments
from gdino_hf.training.ema import EMA_FILE, ExponentialMovingAverage
from gdino_hf.training.lora import add_adapters, merge_adapters
from gdino_hf.training.parameter_groups import GROUPS, freeze, group_of, optimizer_groups
from gdino_hf.training.saving import last_checkpoint
from gdino_hf.training.time_budget import SCHEDULE_STEPS, TimeBudget, follow_time
from gdino_hf.training.trainer import GDinoTrainer

# Recomputed activations give the same gradients up to the rounding of float32.
ROUNDING = 1e-5


@pytest.fixture
def model(tiny_model):
    return copy.deepcopy(tiny_model).train()


@pytest.fixture
def make(model, tiny_processor, drawn, tmp_path):
    """Return a function that makes a trainer on the drawn squares, with any training options."""

    def make(trained=model, **options):
        settings = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 0,
        }
        names = category_names(drawn / "train.json")
        return GDinoTrainer(
            trained,
            GDinoTrainingArguments(**{**settings, **options}),
            labels=names,
            train_dataset=ReproducibleDataset(read_coco(drawn / "train.json")),
            eval_dataset=read_coco(drawn / "val.json"),
            processing_class=tiny_processor,
            data_collator=GDinoDataCollator(tiny_processor, labels=names),
        )

    return make


@pytest.fixture
def batch(drawn, tiny_processor):
    rows = read_coco(drawn / "train.json").select(range(2))
    return GDinoDataCollator(tiny_processor, labels=["cat", "dog"])(rows)


def test_every_parameter_belongs_to_one_group(model):
    groups = {name: group_of(name) for name, _ in model.named_parameters()}
    assert set(groups.values()) == set(GROUPS)
    assert groups["model.text_projection.weight"] == "trunk"
    assert all(group == "text" for name, group in groups.items() if name.startswith("model.text_backbone."))
    assert all(group == "backbone" for name, group in groups.items() if name.startswith("model.backbone."))


def test_each_group_has_its_learning_rate_and_only_matrices_decay(model):
    groups = optimizer_groups(model, 1e-3, 0.05, {"backbone": 0.1, "text": 0.0})
    rates = {"backbone": 1e-4, "text": 0.0, "trunk": 1e-3}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = []
    for group in groups:
        assert group["lr"] == pytest.approx(rates[group["group"]])
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            assert group_of(name) == group["group"]
            assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0), name
            if name.endswith("bias") or "norm" in name.lower():
                assert group["weight_decay"] == 0.0, name
    assert sorted(seen) == sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_learning_rates_keep_their_ratio_through_the_whole_schedule(make):
    trainer = make(max_steps=4, learning_rate=1e-3, backbone_lr_factor=0.5, freeze=["text"])
    ratios = []
    step = trainer.training_step

    def watched(*args, **kwargs):
        rates = {group["group"]: group["lr"] for group in trainer.optimizer.param_groups}
        ratios.append(rates["backbone"] / rates["trunk"])
        assert "text" not in rates
        return step(*args, **kwargs)

    trainer.training_step = watched
    trainer.train()
    assert ratios == pytest.approx([0.5] * 4)


def test_frozen_groups_keep_their_weights_and_stay_in_eval_mode(make, model):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make(freeze=["text", "backbone"], learning_rate=1e-3)
    modes = []
    model.model.text_backbone.register_forward_hook(lambda module, *_: modes.append(module.training))
    model.model.encoder.register_forward_hook(lambda module, *_: modes.append(not module.training))
    trainer.train()
    assert modes
    assert not any(modes)
    for name, parameter in model.named_parameters():
        if group_of(name) != "trunk":
            assert torch.equal(parameter, before[name]), name
    changed = [name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])]
    assert "model.text_projection.weight" in changed


def test_freezing_everything_is_refused(model):
    freeze(model, GROUPS)
    with pytest.raises(ValueError, match="All parameters are frozen"):
        optimizer_groups(model, 1e-3, 0.0, {})
    with pytest.raises(ValueError, match="no parameter group 'heads'"):
        freeze(model, ["heads"])


def test_ema_follows_the_weights():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    ema = ExponentialMovingAverage(model, 0.998)
    model.weight.data.fill_(2.0)
    ema.update(step=1)
    assert ema.weights["weight"].item() == pytest.approx(2 / 11 * 1 + 9 / 11 * 2)
    ema.update(step=10**6)
    assert ema.weights["weight"].item() == pytest.approx(0.998 * 20 / 11 + 0.002 * 2)
    with ema.applied():
        assert model.weight.item() == pytest.approx(0.998 * 20 / 11 + 0.002 * 2)
    assert model.weight.item() == 2.0
    with pytest.raises(ValueError, match="below 1, got 1"):
        ExponentialMovingAverage(model, 1.0)


def test_evaluation_uses_the_ema_and_training_continues_with_its_own_weights(make, model):
    trainer = make(ema_decay=0.5, learning_rate=1e-3)
    trainer.train()
    own = copy.deepcopy(model.state_dict())
    seen = []
    hook = model.model.decoder.register_forward_hook(lambda *_: seen.append(copy.deepcopy(model.state_dict())))
    metrics = trainer.evaluate()
    hook.remove()
    assert {"eval_AP", "eval_AP50", "eval_APs"} <= metrics.keys()
    name = "model.text_projection.weight"
    assert torch.equal(seen[0][name], trainer.ema.weights[name])
    assert not torch.equal(seen[0][name], own[name])
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in own.items())
    trainer.copy_ema_to_model()
    assert torch.equal(model.state_dict()[name], trainer.ema.weights[name])


def test_ema_is_resumed_and_one_of_other_parameters_is_refused(make, tmp_path):
    make(ema_decay=0.5, save_strategy="steps", save_steps=2).train()
    last = last_checkpoint(tmp_path / "run")
    trainer = make(ema_decay=0.5, max_steps=3)
    trainer.train(resume_from_checkpoint=str(last))
    assert trainer.state.global_step == 3
    with pytest.raises(ValueError, match="set ema_decay"):
        make(max_steps=3).train(resume_from_checkpoint=str(last))
    with pytest.raises(ValueError, match="freeze the same groups"):
        make(ema_decay=0.5, freeze=["text", "backbone"], max_steps=3).train(resume_from_checkpoint=str(last))


def test_the_best_ema_is_kept_with_load_best_model_at_end(make, tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make(ema_decay=0.5, learning_rate=1e-3, max_steps=3, save_strategy="steps", save_steps=1, **best)
    trainer.train()
    assert trainer.args.metric_for_best_model == "AP"
    chosen = tmp_path / "run" / f"checkpoint-{trainer.state.best_global_step}"
    # The random model finds nothing, so no later step is better than the first.
    assert chosen.name == "checkpoint-1"
    trainer.copy_ema_to_model()
    for name, weight in load_file(chosen / EMA_FILE).items():
        assert torch.equal(trainer.model.get_parameter(name), weight), name


def test_loss_terms_are_logged_and_add_up(make, model):
    trainer = make(max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    config = model.config
    weights = {"ce": config.class_loss_coefficient, "bbox": config.bbox_loss_coefficient}
    weights["giou"] = config.giou_loss_coefficient
    total = sum(weights[name.split("_")[1]] * value for name, value in log.items() if name.startswith("loss_"))
    assert total == pytest.approx(log["loss"], rel=1e-4)
    assert {"loss_ce_enc", "loss_bbox_dn", "loss_giou_0"} <= log.keys()


def test_time_budget_ends_the_training_and_drives_the_learning_rate(make, tmp_path, monkeypatch):
    # Every step takes 0.25 s by this clock, whatever the machine does besides.
    elapsed = [0.0]
    since_start = property(lambda self: self.earlier + (0.0 if self.started is None else elapsed[0]))
    monkeypatch.setattr(TimeBudget, "seconds", since_start)
    trainer = make(max_steps=10**6, minutes=0.03, save_strategy="steps", save_steps=10**6, lr_scheduler_type="linear")
    step = trainer.training_step

    def timed(*args, **kwargs):
        elapsed[0] += 0.25
        return step(*args, **kwargs)

    trainer.training_step = timed
    trainer.train()
    # Eight steps use up 1.8 s. The clock is read before a step, so a ninth follows.
    assert trainer.state.global_step == 9
    assert trainer.time_budget.seconds >= 0.03 * 60
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.5 * rates[0]
    last = last_checkpoint(tmp_path / "run")
    assert json.loads((last / "clock.json").read_text())["seconds"] >= 0.03 * 60
    elapsed[0] = 0.0
    again = make(max_steps=10**6, minutes=0.03, save_strategy="no")
    again.train(resume_from_checkpoint=str(last))
    assert again.state.global_step == trainer.state.global_step
    # The time budget replaces the number of epochs.
    assert make(max_steps=-1, num_train_epochs=1, minutes=1.0).args.max_steps >= 10**6


def test_the_learning_rate_follows_time_or_steps_whichever_is_nearer_its_end():
    budget = TimeBudget(minutes=1.0)
    factor = follow_time(budget, lambda step: 1 - step / SCHEDULE_STEPS, max_steps=100)
    assert factor(25) == pytest.approx(0.75)
    budget.tick(45.0)
    assert factor(25) == pytest.approx(0.25)
    assert factor(90) == pytest.approx(0.1)
    assert factor(1000) == 0.0


def test_adapters_start_without_effect_train_and_merge_exactly(model, batch):
    plain = copy.deepcopy(model).eval()
    adapted = add_adapters(model, rank=2)
    adapted.eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(**batch).pred_boxes, plain(**batch).pred_boxes, rtol=0, atol=ROUNDING)
    adapted.train()
    adapted(**batch).loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    without = [name for name, parameter in trained.items() if parameter.grad is None]
    assert without == []
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    for head in ("bbox_embed.0", "class_embed.0", "encoder_output_bbox_embed", "encoder_output_class_embed"):
        assert not [n for n, _ in plain.named_parameters() if head in n] or any(head in name for name in trained), head
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    adapted.eval()
    with torch.no_grad():
        expected = adapted(**batch)
        merged = merge_adapters(adapted)
        found = merged(**batch)
    assert isinstance(merged, GDinoForObjectDetection)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, rtol=0, atol=1e-4)


def test_adapters_train_through_the_trainer_and_resume(make, model, tmp_path):
    adapted = add_adapters(model, rank=2)
    make(adapted, save_strategy="steps", save_steps=2, ema_decay=0.5).train()
    trainer = make(adapted, max_steps=3, ema_decay=0.5)
    trainer.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "run")))
    assert trainer.state.global_step == 3
    assert "eval_AP" in trainer.evaluate()


def test_gradient_checkpointing_gives_the_same_gradients(model, batch):
    model.config.num_denoising_queries = 0
    model.model.backbone.eval()
    model.model.text_backbone.eval()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max().clamp(min=1.0)
        torch.testing.assert_close(gradients[1][name] / scale, gradient / scale, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    "options", [{"bf16": True}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}]
)
def test_trains_with(make, options):
    trainer = make(**options)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)


def test_accumulated_step_equals_that_of_one_large_batch(make, model, drawn):
    content = json.loads((drawn / "train.json").read_text())
    # With unequal numbers of boxes, a mean of per-batch means would be wrong.
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] % 3 or x["category_id"]]
    (drawn / "train.json").write_text(json.dumps(content))
    model.config.num_denoising_queries = 0
    logs = []
    for size, steps in ((4, 1), (1, 4)):
        trainer = make(
            copy.deepcopy(model),
            freeze=["text", "backbone"],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for name in ("loss", "loss_ce", "loss_giou_enc"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-5), name
    assert logs[1]["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=1e-4)


@pytest.mark.soak
def test_a_compiled_model_trains_like_an_eager_one(make, model):
    """The graph is captured in full, but by a backend without code generation, which would take minutes."""
    losses = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = make(copy.deepcopy(model), max_steps=1, **options)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
