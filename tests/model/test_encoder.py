"""Claims about the encoder: the order of a layer's parts, and which tokens affect which."""

import pytest
import torch

from gdino_hf.model.configuration_gdino import GDinoConfig
from gdino_hf.model.encoder import DeformableLayer, Encoder, EncoderLayer, TextEnhancerLayer
from gdino_hf.model.image_geometry import grid_reference_points

WIDTH = 8
SHAPES = [(2, 3), (1, 2)]
TOKENS = 8
# float32 sums in a different order.
TOLERANCE = 1e-5


def make_config(layers=2):
    return GDinoConfig(
        d_model=WIDTH,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_layers=layers,
        encoder_ffn_dim=16,
        encoder_n_points=2,
        num_feature_levels=len(SHAPES),
        fusion_init_value=0.5,
    )


def lively(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def make_inputs():
    generator = torch.Generator().manual_seed(1)
    vision, vision_position = (torch.randn(2, TOKENS, WIDTH, generator=generator) for _ in range(2))
    text, text_position = (torch.randn(2, 5, WIDTH, generator=generator) for _ in range(2))
    block = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()
    vision_mask = torch.ones(2, TOKENS).bool()
    vision_mask[1, [2, 5, 7]] = False
    return {
        "vision": vision,
        "text": text,
        "vision_position_embedding": vision_position,
        "text_position_embedding": text_position,
        "spatial_shapes": SHAPES,
        "vision_mask": vision_mask,
        "text_mask": torch.ones(2, 5).bool(),
        "phrase_mask": block.expand(2, 5, 5),
    }


def test_text_layer_is_self_attention_then_feed_forward_each_normalized_after():
    layer, inputs = lively(TextEnhancerLayer(make_config())), make_inputs()
    text, position, mask = inputs["text"], inputs["text_position_embedding"], inputs["phrase_mask"]
    placed = text + position
    x = layer.layer_norm_before(text + layer.self_attn(placed, placed, text, mask[:, None])[0])
    x = layer.layer_norm_after(x + layer.fc2(layer.fc1(x).relu()))
    torch.testing.assert_close(layer(text, position, mask)[0], x, rtol=0, atol=TOLERANCE)


def test_phrases_do_not_affect_each_other():
    layer, inputs = lively(TextEnhancerLayer(make_config())), make_inputs()
    text, position, mask = inputs["text"], inputs["text_position_embedding"], inputs["phrase_mask"]
    found, _ = layer(text, position, mask)
    text[:, 2:] = 9.0
    again, _ = layer(text, position, mask)
    torch.testing.assert_close(found[:, :2], again[:, :2], rtol=0, atol=1e-6)


def test_image_layer_is_deformable_attention_then_feed_forward():
    layer, inputs = lively(DeformableLayer(make_config())), make_inputs()
    vision, position, mask = inputs["vision"], inputs["vision_position_embedding"], inputs["vision_mask"]
    references = grid_reference_points(SHAPES, torch.ones(2, 2, 2))
    x = layer.self_attn_layer_norm(vision + layer.self_attn(vision + position, vision, references, SHAPES, mask)[0])
    x = layer.final_layer_norm(x + layer.fc2(layer.fc1(x).relu()))
    torch.testing.assert_close(layer(vision, position, references, SHAPES, mask)[0], x, rtol=0, atol=TOLERANCE)


def test_a_layer_fuses_before_either_side_attends_to_itself():
    layer, inputs = lively(EncoderLayer(make_config())), make_inputs()
    references = grid_reference_points(SHAPES, torch.ones(2, 2, 2))
    found = layer(reference_points=references, **inputs)
    masks = inputs["vision_mask"], inputs["text_mask"]
    vision, text, _ = layer.fusion_layer(inputs["vision"], inputs["text"], *masks)
    text, _ = layer.text_enhancer_layer(text, inputs["text_position_embedding"], inputs["phrase_mask"])
    position = inputs["vision_position_embedding"]
    vision, _ = layer.deformable_layer(vision, position, references, SHAPES, inputs["vision_mask"])
    torch.testing.assert_close(found[0], vision, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found[1], text, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layers", [1, 3])
def test_states_are_the_features_before_each_layer_and_after_the_last(layers):
    encoder, inputs = lively(Encoder(make_config(layers))), make_inputs()
    vision_states, text_states, attentions = encoder(
        reference_points=grid_reference_points(SHAPES, torch.ones(2, 2, 2)), **inputs
    )
    assert len(vision_states) == len(text_states) == layers + 1
    assert attentions is None
    assert torch.equal(vision_states[0], inputs["vision"])
    assert torch.equal(text_states[0], inputs["text"])
    last = dict(inputs, vision=vision_states[-2], text=text_states[-2])
    found = encoder.layers[-1](reference_points=grid_reference_points(SHAPES, torch.ones(2, 2, 2)), **last)
    assert torch.equal(found[0], vision_states[-1])
    assert torch.equal(found[1], text_states[-1])


def test_padding_does_not_affect_real_tokens():
    encoder, inputs = lively(Encoder(make_config())), make_inputs()
    references = grid_reference_points(SHAPES, torch.ones(2, 2, 2))
    found = [states[-1] for states in encoder(reference_points=references, **inputs)[:2]]
    mask = inputs["vision_mask"]
    inputs["vision"] = inputs["vision"].masked_fill(~mask[..., None], 40.0)
    again = [states[-1] for states in encoder(reference_points=references, **inputs)[:2]]
    torch.testing.assert_close(found[0][mask], again[0][mask], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found[1], again[1], rtol=0, atol=TOLERANCE)
