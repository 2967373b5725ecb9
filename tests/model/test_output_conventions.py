"""Claims about outputs that follow transformers: names and order of fields, attentions, states, and arguments."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, Trainer, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gdino_hf import GDinoForObjectDetection
from random_models import make_random_model

# Sums in a different order.
ROUNDING = 1e-5
LAYERS, QUERIES, HEADS, POINTS, LEVELS = 2, 20, 4, 4, 4


@pytest.fixture
def model(tiny_config):
    return make_random_model(tiny_config)


@pytest.fixture
def inputs(tiny_tokenizer):
    text = tiny_tokenizer(["cat. dog.", "person."], padding=True, return_tensors="pt")
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 64, 64, dtype=torch.int64)
    mask[1, :, 40:] = 0
    pixels = torch.randn(2, 3, 64, 64, generator=generator)
    return {
        "pixel_values": pixels,
        "pixel_mask": mask,
        "input_ids": text.input_ids,
        "attention_mask": text.attention_mask,
    }


def make_labels(*counts):
    box = torch.tensor([[0.4, 0.5, 0.3, 0.4]])
    return [{"class_labels": torch.zeros(n, dtype=torch.int64), "boxes": box.repeat(n, 1)} for n in counts]


def test_the_fields_and_their_order_are_those_of_transformers(model, inputs):
    ours = model(**inputs, labels=make_labels(1, 2), output_hidden_states=True, output_attentions=True)
    names = list(GroundingDinoForObjectDetection.forward.__globals__["GroundingDinoObjectDetectionOutput"]().__dict__)
    assert [name for name in ours if name in names] == names
    assert [name for name in ours if name not in names] == ["attention_mask"]
    core = list(GroundingDinoForObjectDetection.forward.__globals__["GroundingDinoModelOutput"]().__dict__)
    found = list(model.model(**inputs, output_hidden_states=True, output_attentions=True))
    assert found[: len(core)] == core


def test_tuples_hold_loss_terms_logits_and_boxes_in_that_order(model, inputs):
    labels = make_labels(1, 2)
    whole = model(**inputs, labels=labels)
    parts = model(**inputs, labels=labels, return_dict=False)
    assert isinstance(parts, tuple)
    assert parts[0].ndim == 0
    assert torch.equal(whole[0], whole.loss)
    for output in (parts, whole.to_tuple()):
        assert set(output[1]) == set(whole.loss_dict)
        assert output[2].shape == whole.logits.shape
        assert output[3].shape == whole.pred_boxes.shape
    without = model(**inputs, return_dict=False)
    assert [x.shape for x in without[:2]] == [whole.logits.shape, whole.pred_boxes.shape]


@pytest.mark.parametrize("core", [False, True])
def test_the_configuration_decides_about_tuples_and_the_call_overrules_it(tiny_config, inputs, core):
    model = make_random_model(tiny_config)
    model = model.model if core else model
    model.config.return_dict = False
    assert type(model(**inputs)) is tuple
    assert hasattr(model(**inputs, return_dict=True), "last_hidden_state")
    model.config.return_dict = True
    assert hasattr(model(**inputs), "last_hidden_state")
    assert type(model(**inputs, return_dict=False)) is tuple


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("name", ["pixel_value", "output_attention", "num_items_in_batch", "box_heads"])
def test_unknown_arguments_are_refused(model, inputs, core, name):
    with pytest.raises(TypeError, match=name):
        (model.model if core else model)(**inputs, **{name: None})


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("by_config", [False, True])
def test_attentions_have_transformers_names_and_documented_shapes(tiny_config, inputs, implementation, by_config):
    config = copy.deepcopy(tiny_config)
    if by_config and implementation == "eager":
        config._attn_implementation = "eager"
        config.output_attentions = True
    model = make_random_model(config)
    if not by_config:
        model.set_attn_implementation(implementation)
    asked = {} if by_config and implementation == "eager" else {"output_attentions": True}
    plain = model(**inputs, output_attentions=False)
    found = model(**inputs, **asked)
    tokens, text = found.encoder_last_hidden_state_vision.shape[1], inputs["input_ids"].shape[1]
    assert [[tuple(x.shape) for x in kind] for kind in found.encoder_attentions] == [
        [(2, HEADS // 2, tokens, text)] * LAYERS,
        [(2, HEADS // 2, text, tokens)] * LAYERS,
        [(2, HEADS // 2, text, text)] * LAYERS,
        [(2, tokens, HEADS, LEVELS, POINTS)] * LAYERS,
    ]
    assert [[tuple(x.shape) for x in kind] for kind in found.decoder_attentions] == [
        [(2, HEADS, QUERIES, QUERIES)] * LAYERS,
        [(2, HEADS, QUERIES, text)] * LAYERS,
        [(2, QUERIES, HEADS, LEVELS, POINTS)] * LAYERS,
    ]
    for kinds, points in ((found.encoder_attentions, 3), (found.decoder_attentions, 2)):
        for index, kind in enumerate(kinds):
            for weights in kind:
                total = weights.sum((-2, -1) if index == points else -1)
                torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=ROUNDING)
    assert plain.encoder_attentions is None
    assert plain.decoder_attentions is None
    torch.testing.assert_close(found.pred_boxes, plain.pred_boxes, rtol=0, atol=1e-4)


def test_computing_attention_eagerly_for_its_weights_is_said_once(model, inputs, caplog):
    # Another name, since other tests have used up the message for the usual one.
    ALL_ATTENTION_FUNCTIONS.register("sdpa_of_this_test", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation({"": "sdpa_of_this_test"})
    for _ in range(2):
        model(**inputs, output_attentions=True)
    assert caplog.text.count("'sdpa_of_this_test' does not return: attention is computed eagerly") == 1
    caplog.clear()
    model.set_attn_implementation("eager")
    model(**inputs, output_attentions=True)
    assert not caplog.records


def test_padding_gets_no_attention(model, inputs):
    found = model(**inputs, output_attentions=True)
    pad = ~inputs["attention_mask"].bool()
    assert pad.any()
    assert (
        not found.encoder_attentions[0][0]
        .transpose(1, 3)
        .transpose(1, 2)[pad.nonzero(as_tuple=True)[0], :, :]
        .isnan()
        .any()
    )
    assert found.encoder_attentions[0][0].permute(0, 3, 1, 2)[pad].abs().max() == 0
    assert found.decoder_attentions[1][0].permute(0, 3, 1, 2)[pad].abs().max() == 0
    assert found.encoder_attentions[1][0][1].std() > 0


def test_hidden_states_are_those_before_each_layer_and_after_the_last(model, inputs):
    found = model(**inputs, output_hidden_states=True)
    assert len(found.decoder_hidden_states) == LAYERS + 1
    assert torch.equal(found.decoder_hidden_states[-1], found.last_hidden_state)
    for layer in range(LAYERS):
        assert torch.equal(found.decoder_hidden_states[layer + 1], found.intermediate_hidden_states[:, layer])
    assert len(found.encoder_vision_hidden_states) == len(found.encoder_text_hidden_states) == LAYERS + 1
    assert torch.equal(found.encoder_vision_hidden_states[-1], found.encoder_last_hidden_state_vision)
    assert model(**inputs).decoder_hidden_states is None


def test_attentions_and_hidden_states_leave_out_denoising_queries(model, inputs):
    found = model.train()(**inputs, labels=make_labels(3, 0), output_attentions=True, output_hidden_states=True)
    own, over_text, over_points = found.decoder_attentions
    assert own[0].shape[-2:] == (QUERIES, QUERIES)
    assert over_text[0].shape[2] == over_points[0].shape[1] == QUERIES
    assert {x.shape[1] for x in found.decoder_hidden_states} == {QUERIES}


def test_attentions_carry_the_gradient(model, inputs):
    found = model(**inputs, output_attentions=True)
    kinds = [*found.encoder_attentions, *found.decoder_attentions]
    gradients = torch.autograd.grad(found.logits[found.logits.isfinite()].sum(), [kind[0] for kind in kinds])
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_an_optimized_model_gives_attentions_too(tiny_config, inputs):
    wanted = make_random_model(tiny_config)(**inputs, output_attentions=True)
    with torch.inference_mode():
        found = make_random_model(tiny_config).optimize_for_inference()(**inputs, output_attentions=True)
    for ours, theirs in zip(found.decoder_attentions, wanted.decoder_attentions, strict=True):
        torch.testing.assert_close(ours[-1], theirs[-1], rtol=0, atol=1e-3)


def test_attentions_equal_those_of_transformers(tmp_path):
    text = {
        "model_type": "bert",
        "vocab_size": 1100,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    swin = {"model_type": "swin", "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 4}
    config = GroundingDinoConfig(
        backbone_config={**swin, "image_size": 64, "out_features": ["stage2", "stage3", "stage4"]},
        text_config={**text, "num_attention_heads": 4, "intermediate_size": 32},
        d_model=64,
        encoder_layers=LAYERS,
        encoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_layers=LAYERS,
        decoder_ffn_dim=32,
        decoder_attention_heads=4,
        num_queries=10,
        dropout=0.0,
    )
    torch.manual_seed(0)
    peer = GroundingDinoForObjectDetection(config).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "backbone" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    peer.tie_weights()
    peer.save_pretrained(tmp_path)
    ours = GDinoForObjectDetection.from_pretrained(tmp_path).eval()
    inputs = {
        "pixel_values": torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)),
        "input_ids": torch.tensor([[101, 60, 1012, 61, 62, 1012, 102]]),
    }
    with torch.no_grad():
        wanted = peer(**inputs, output_attentions=True, output_hidden_states=True)
        found = ours(**inputs, output_attentions=True, output_hidden_states=True)
    for name in ("encoder_attentions", "decoder_attentions"):
        for mine, theirs in zip(found[name], wanted[name], strict=True):
            for x, y in zip(mine, theirs, strict=True):
                # transformers joins batch and heads in the first two kinds of the encoder.
                torch.testing.assert_close(x.reshape(y.shape), y, rtol=0, atol=1e-4)
    for name in ("decoder_hidden_states", "encoder_vision_hidden_states", "encoder_text_hidden_states"):
        for x, y in zip(found[name], wanted[name], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-3)


def test_stock_trainer_keeps_loss_terms_logits_and_boxes(model, inputs, tmp_path):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            row = {name: value[index % 2] for name, value in inputs.items()}
            return {**row, "labels": make_labels(index)[0]}

    def collate(rows):
        batch = {name: torch.stack([row[name] for row in rows]) for name in inputs}
        return {**batch, "labels": [row["labels"] for row in rows]}

    for concatenated in (False, True):
        arguments = TrainingArguments(
            tmp_path,
            per_device_eval_batch_size=2,
            remove_unused_columns=False,
            eval_do_concat_batches=concatenated,
            report_to=[],
            use_cpu=True,
        )
        seen = []
        trainer = Trainer(
            model.eval(),
            arguments,
            data_collator=collate,
            compute_metrics=lambda prediction, seen=seen: seen.append(prediction.predictions) or {},
        )
        metrics = trainer.evaluate(Rows())
        assert metrics["eval_loss"] > 0
        batches = [seen[0]] if concatenated else seen[0]
        for batch in batches:
            terms, logits, boxes = batch
            rows = 4 if concatenated else 2
            assert logits.shape == (rows, QUERIES, model.config.max_text_len)
            assert boxes.shape == (rows, QUERIES, 4)
            assert "loss_ce" in terms
