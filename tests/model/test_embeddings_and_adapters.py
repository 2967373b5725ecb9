"""Claims about token embeddings that change their size, and about adapters trained under gradient checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import ResNetConfig

from gdino_hf import GDinoForObjectDetection, GDinoModel
from gdino_hf.model.csp_pan import CspPanConfig
from random_models import make_random_model

LABELS = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}]
STAGES = ["stage2", "stage3", "stage4"]
BACKBONES = {
    "swin": None,
    "csp_pan": CspPanConfig(stem_width=8, stage_widths=[8] * 4, stage_depths=[1] * 4, pan_width=8),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=STAGES),
}


@pytest.fixture
def inputs(tiny_tokenizer):
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, **tiny_tokenizer("cat. dog.", return_tensors="pt")}


@pytest.mark.parametrize("kind", [GDinoModel, GDinoForObjectDetection])
def test_embeddings_can_be_replaced(tiny_config, inputs, kind):
    model = kind(copy.deepcopy(tiny_config)).eval()
    before = model(**inputs).encoder_last_hidden_state_text
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    new = nn.Embedding(tiny_config.text_config.vocab_size, tiny_config.text_config.hidden_size)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new
    assert not torch.equal(model(**inputs).encoder_last_hidden_state_text, before)


@pytest.mark.parametrize("mean", [True, False])
def test_a_vocabulary_can_grow_and_shrink_and_is_saved(tiny_config, inputs, tmp_path, mean):
    model = make_random_model(tiny_config)
    size, wanted = tiny_config.text_config.vocab_size, model(**inputs).pred_boxes
    model.resize_token_embeddings(size + 7, mean_resizing=mean)
    assert model.get_input_embeddings().weight.shape[0] == model.config.text_config.vocab_size == size + 7
    assert torch.equal(model(**inputs).pred_boxes, wanted)
    new_token = dict(inputs, input_ids=inputs["input_ids"].clone())
    new_token["input_ids"][0, 1] = size + 6
    assert model(**new_token).pred_boxes.isfinite().all()
    model.save_pretrained(tmp_path)
    again = GDinoForObjectDetection.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**new_token).pred_boxes, model(**new_token).pred_boxes, rtol=0, atol=1e-5)
    model.resize_token_embeddings(size)
    torch.testing.assert_close(model(**inputs).pred_boxes, wanted, rtol=0, atol=1e-5)


def train_step(model, inputs):
    torch.manual_seed(0)
    model.train()
    model(**inputs, labels=LABELS).loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.requires_grad and x.grad is not None}


def adapted(config):
    model = make_random_model(config)
    torch.manual_seed(1)
    return model, LoraConfig(target_modules=["query", "value", "fc1", "value_proj", "q_proj"], init_lora_weights=False)


@pytest.mark.parametrize("backbone", list(BACKBONES))
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("checkpointing_first", [True, False])
def test_lora_with_checkpointing_works_in_either_order(tiny_config, inputs, backbone, reentrant, checkpointing_first):
    config = copy.deepcopy(tiny_config)
    config.encoder_layers, config.num_denoising_queries = 1, 0
    if BACKBONES[backbone] is not None:
        config.backbone_config = copy.deepcopy(BACKBONES[backbone])
    model, lora = adapted(config)
    wanted = train_step(get_peft_model(model, lora), inputs)
    model, lora = adapted(config)
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if checkpointing_first:
        model.gradient_checkpointing_enable(**options)
        model.enable_input_require_grads()
        model = get_peft_model(model, lora)
    else:
        model = get_peft_model(model, lora)
        model.gradient_checkpointing_enable(**options)
        model.enable_input_require_grads()
    found = train_step(model, inputs)
    assert found.keys() == wanted.keys()
    assert all(any(f"model.{part}." in name for name in found) for part in ("text_backbone", "encoder", "decoder"))
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_inputs_stop_requiring_gradients(tiny_config, inputs):
    model = make_random_model(tiny_config).requires_grad_(False)
    model.enable_input_require_grads()
    assert model(**inputs).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(**inputs).logits.requires_grad
