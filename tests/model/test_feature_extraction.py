"""Claims about get_image_features and get_text_features: arguments and outputs follow transformers' conventions."""

from __future__ import annotations

import copy

import pytest
import torch

from random_models import make_random_model

# Sums in a different order.
ROUNDING = 1e-5
STAGES, TEXT_LAYERS = 4, 1


@pytest.fixture
def model(tiny_config):
    return make_random_model(tiny_config)


@pytest.fixture
def inputs(tiny_tokenizer):
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, **tiny_tokenizer(["cat. dog.", "person."], padding=True, return_tensors="pt")}


def image_and_text(model, inputs, **options):
    return (
        model.get_image_features(inputs["pixel_values"], **options),
        model.get_text_features(inputs["input_ids"], inputs["attention_mask"], **options),
    )


@pytest.mark.parametrize("core", [False, True])
def test_states_of_both_backbones_are_returned_on_request(model, inputs, core):
    owner = model.model if core else model
    plain = image_and_text(owner, inputs)
    for found in plain:
        assert found.hidden_states is None
        assert found.attentions is None
        assert found.pooler_output is None
    model.set_attn_implementation("eager")
    images, texts = image_and_text(owner, inputs, output_hidden_states=True, output_attentions=True)
    assert len(images.hidden_states) == STAGES + 1
    assert len(images.attentions) == STAGES
    assert len(texts.hidden_states) == TEXT_LAYERS + 1
    assert len(texts.attentions) == TEXT_LAYERS
    projected = model.model.text_projection(texts.hidden_states[-1])
    torch.testing.assert_close(projected, texts.last_hidden_state, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(texts.last_hidden_state, plain[1].last_hidden_state, rtol=0, atol=ROUNDING)
    for ours, wanted in zip(images.feature_maps, plain[0].feature_maps, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=ROUNDING)


def test_attention_of_the_text_stays_within_a_phrase(model, inputs):
    model.set_attn_implementation("eager")
    texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"], output_attentions=True)
    other_phrase = ~texts.phrase_mask[:, None].expand_as(texts.attentions[0])
    assert texts.attentions[0][other_phrase].abs().max() == 0
    assert texts.attentions[0].std() > 0


def test_the_configuration_decides_about_states_and_tuples_and_the_call_overrules_it(model, inputs):
    model.config.output_hidden_states = True
    assert all(found.hidden_states is not None for found in image_and_text(model, inputs))
    assert all(x.hidden_states is None for x in image_and_text(model, inputs, output_hidden_states=False))
    model.config.output_hidden_states, model.config.return_dict = False, False
    wanted = image_and_text(model, inputs, return_dict=True)
    for found, whole in zip(image_and_text(model, inputs), wanted, strict=True):
        assert type(found) is tuple
        assert len(found) == len(whole.to_tuple())
    assert torch.equal(image_and_text(model, inputs)[1][0], wanted[1].last_hidden_state)
    assert type(model(**inputs)) is tuple


def test_features_with_states_can_be_used_by_forward(model, inputs):
    wanted = model(**inputs)
    for rows in (slice(0, 2), slice(0, 1)):
        images = model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
        texts = model.get_text_features(
            inputs["input_ids"][rows], inputs["attention_mask"][rows], output_hidden_states=True
        )
        found = model(image_features=images, text_features=texts)
        torch.testing.assert_close(found.pred_boxes[rows], wanted.pred_boxes[rows], rtol=0, atol=ROUNDING)


def test_last_hidden_state_of_an_image_holds_the_cells_of_all_levels(model, inputs):
    images = model.get_image_features(inputs["pixel_values"])
    sizes = [x.shape[-2] * x.shape[-1] for x in images.feature_maps]
    assert images.last_hidden_state.shape == (2, sum(sizes), model.config.d_model)
    first = images.last_hidden_state[:, : sizes[0]].transpose(1, 2).reshape(images.feature_maps[0].shape)
    assert torch.equal(first, images.feature_maps[0])


def test_states_of_images_of_several_sizes_are_refused(model, inputs):
    pixels = inputs["pixel_values"]
    found = model.get_image_features(pixels, image_sizes=[(64, 40), (64, 40)], output_hidden_states=True)
    wanted = model.get_image_features(pixels[..., :40], output_hidden_states=True)
    torch.testing.assert_close(found.hidden_states[-1], wanted.hidden_states[-1], rtol=0, atol=ROUNDING)
    with pytest.raises(ValueError, match=r"output_hidden_states with image_sizes .*one size"):
        model.get_image_features(pixels, image_sizes=[(64, 40), (64, 64)], output_hidden_states=True)
    model.config.output_hidden_states = True
    assert model.get_image_features(pixels, image_sizes=[(64, 40), (64, 64)]).hidden_states is None


def test_a_cached_prompt_gives_states_too(tiny_config, inputs):
    model = make_random_model(copy.deepcopy(tiny_config)).optimize_for_inference()
    for _ in range(2):
        _, texts = image_and_text(model, inputs)
        assert texts.hidden_states is None
        images, texts = image_and_text(model, inputs, output_hidden_states=True)
        assert len(texts.hidden_states) == TEXT_LAYERS + 1
        assert len(images.hidden_states) == STAGES + 1
