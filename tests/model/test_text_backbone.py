"""Claims about text encoders: which ones are accepted, and the position ids of a phrase's tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    CamembertConfig,
    MPNetConfig,
    RobertaConfig,
    SqueezeBertConfig,
    XLMRobertaConfig,
)

from gdino_hf import GDinoModel
from gdino_hf.model.text_backbone import build_text_backbone

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
# float32 rounding of attention over one phrase, with and without masked phrases.
ROUNDING = 1e-5


def with_text(tiny_config, text_config):
    config = copy.deepcopy(tiny_config)
    config.text_config = text_config
    return config


@pytest.mark.parametrize("text_class", [BertConfig, RobertaConfig, XLMRobertaConfig, CamembertConfig, MPNetConfig])
def test_a_phrase_gets_the_positions_that_the_encoder_was_trained_with(tiny_config, text_class):
    config = with_text(tiny_config, text_class(vocab_size=200, **SIZES))
    torch.manual_seed(0)
    model = GDinoModel(config).eval()
    start, end, period, _ = config.special_token_ids
    phrases = ([60, 61, period], [70, period])
    input_ids = torch.tensor([[start, *phrases[0], *phrases[1], end]])
    with torch.no_grad():
        found = model.get_text_features(input_ids).last_hidden_state[0]
        # Given a single phrase and no position ids, the encoder uses the positions it was trained with.
        for phrase, at in zip(phrases, (1, 4), strict=True):
            hidden = model.text_backbone(input_ids=torch.tensor([phrase])).last_hidden_state
            expected = model.text_projection(hidden)[0]
            torch.testing.assert_close(found[at : at + len(phrase)], expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("model_type", ["deberta", "deberta-v2", "convbert", "mobilebert", "t5", "siglip_text_model"])
def test_encoders_that_cannot_keep_phrases_apart_are_refused(tiny_config, model_type):
    config = with_text(tiny_config, AutoConfig.for_model(model_type))
    with pytest.raises(ValueError, match=f"model_type '{model_type}' cannot serve as a text encoder, since .*; use"):
        GDinoModel(config)


def test_a_pooler_that_cannot_be_left_out_is_frozen(tiny_config):
    text_config = SqueezeBertConfig(vocab_size=200, embedding_size=16, **SIZES)
    assert AutoModel.from_config(text_config).pooler is not None
    model = build_text_backbone(with_text(tiny_config, text_config))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pooler.dense.weight", "pooler.dense.bias"}
