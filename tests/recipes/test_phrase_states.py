"""States of the frozen text encoder, kept by phrase."""

import copy

import pytest
import torch

from gdino_hf.model.modeling_gdino import GDinoModel
from gdino_hf.recipes.phrase_states import PhraseStates


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    model = GDinoModel(copy.deepcopy(tiny_config)).train()
    model.text_backbone.requires_grad_(False).eval()
    return model


def prompt_of(tokenizer, texts):
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def test_features_and_gradients_equal_those_without_kept_states(model, tiny_tokenizer):
    ids, mask = prompt_of(tiny_tokenizer, ["a cat. dog. red cup.", "dog. a cat."])
    expected = model._text_features(ids, mask, None)
    states = PhraseStates()
    for _ in range(2):
        found = states.get(model, ids, mask, None)
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-6)
        for name in ("phrase_ids", "phrase_mask", "position_ids", "attention_mask", "input_ids"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
    weight = model.text_projection.weight
    gradients = [torch.autograd.grad(x.last_hidden_state.square().sum(), weight)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


def test_the_encoder_runs_only_on_prompts_with_a_new_phrase(model, tiny_tokenizer):
    states = PhraseStates()
    states.get(model, *prompt_of(tiny_tokenizer, ["cat. dog.", "red cup. cat."]), None)
    assert states.encoded == 2
    # Phrases in another order and another number, and padding, are known.
    states.get(model, *prompt_of(tiny_tokenizer, ["dog. red cup. cat.", "cat."]), None)
    assert states.encoded == 2
    states.get(model, *prompt_of(tiny_tokenizer, ["cat. dog.", "red."]), None)
    assert states.encoded == 3


def test_forward_uses_the_states(model, tiny_tokenizer):
    ids, mask = prompt_of(tiny_tokenizer, ["cat. dog."])
    expected = model.get_text_features(ids, mask).last_hidden_state
    model.text_feature_cache = PhraseStates()
    torch.testing.assert_close(model.get_text_features(ids, mask).last_hidden_state, expected, rtol=1e-5, atol=1e-6)
    assert model.text_feature_cache.encoded == 1
