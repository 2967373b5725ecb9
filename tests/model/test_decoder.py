"""Claims about the decoder: the order of its parts, how boxes are refined, and where their gradients go."""

import pytest
import torch

from gdino_hf.model.configuration_gdino import GDinoConfig
from gdino_hf.model.decoder import Decoder, DecoderLayer
from gdino_hf.model.heads import BoxHead
from gdino_hf.model.position_encoding import box_position_embedding

WIDTH, LAYERS, QUERIES = 8, 3, 5
SHAPES = [(3, 4), (2, 2)]
# float32 sums in a different order.
TOLERANCE = 1e-5


def make_config(**changes):
    return GDinoConfig(
        d_model=WIDTH,
        decoder_attention_heads=2,
        encoder_attention_heads=2,
        decoder_layers=LAYERS,
        decoder_ffn_dim=16,
        decoder_n_points=2,
        num_feature_levels=len(SHAPES),
        **changes,
    )


def make_decoder(**changes):
    torch.manual_seed(0)
    config = make_config(**changes)
    decoder, heads = Decoder(config).eval(), [BoxHead(config) for _ in range(LAYERS)]
    with torch.no_grad():
        for module in (decoder, *heads):
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return decoder, heads


def make_inputs(ratios=(1.0, 1.0)):
    generator = torch.Generator().manual_seed(1)
    tokens = sum(h * w for h, w in SHAPES)
    return {
        "queries": torch.randn(2, QUERIES, WIDTH, generator=generator),
        "references": 0.2 + 0.6 * torch.rand(2, QUERIES, 4, generator=generator),
        "vision": torch.randn(2, tokens, WIDTH, generator=generator),
        "text": torch.randn(2, 4, WIDTH, generator=generator),
        "valid_ratios": torch.tensor(ratios).expand(2, len(SHAPES), 2),
        "spatial_shapes": SHAPES,
        "vision_mask": None,
        "text_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool(),
    }


def by(heads):
    return lambda index, queries: heads[index](queries)


def logit(x, eps):
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def test_a_layer_is_self_then_text_then_image_attention_then_feed_forward():
    torch.manual_seed(0)
    layer = DecoderLayer(make_config()).eval()
    inputs = make_inputs()
    queries, vision, text = inputs["queries"], inputs["vision"], inputs["text"]
    position = torch.randn(2, QUERIES, WIDTH)
    references = inputs["references"][:, :, None].expand(-1, -1, len(SHAPES), -1)
    mask = torch.ones(1, 1, QUERIES, QUERIES).bool().tril()
    found, _ = layer(queries, position, references, vision, text, SHAPES, None, inputs["text_mask"], mask)
    x = queries
    x = layer.self_attn_layer_norm(x + layer.self_attn(x + position, x + position, x, mask)[0])
    seen = layer.encoder_attn_text(x + position, text, text, inputs["text_mask"][:, None, None])[0]
    x = layer.encoder_attn_text_layer_norm(x + seen)
    x = layer.encoder_attn_layer_norm(x + layer.encoder_attn(x + position, vision, references, SHAPES, None)[0])
    x = layer.final_layer_norm(x + layer.fc2(layer.fc1(x).relu()))
    torch.testing.assert_close(found, x, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("eps", [1e-3, 0.3])
def test_each_layer_refines_the_boxes_of_the_one_before_from_its_unnormalized_state(eps):
    decoder, heads = make_decoder(decoder_inverse_sigmoid_eps=eps, inverse_sigmoid_eps=1e-5)
    raw = []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda module, args, output: raw.append(output[0]))
    inputs = make_inputs()
    states = decoder(**inputs, box_deltas=by(heads))
    references = inputs["references"]
    for index in range(LAYERS):
        torch.testing.assert_close(states.input_references[index], references, rtol=0, atol=TOLERANCE)
        references = (heads[index](raw[index]) + logit(references, eps)).sigmoid()
        torch.testing.assert_close(states.output_references[index], references, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(states.hidden_states[index], decoder.layer_norm(raw[index]), rtol=0, atol=TOLERANCE)
    assert torch.equal(states.last_hidden_state, states.hidden_states[-1])


def test_the_decoder_eps_defaults_to_the_models():
    changes = {"inverse_sigmoid_eps": 0.25}
    one, heads = make_decoder(**changes, decoder_inverse_sigmoid_eps=None)
    two, _ = make_decoder(**changes, decoder_inverse_sigmoid_eps=0.25)
    inputs = make_inputs()
    for x, y in zip(*(d(**inputs, box_deltas=by(heads)).output_references for d in (one, two)), strict=True):
        assert torch.equal(x, y)


def test_gradient_reaches_the_previous_head_through_input_references():
    decoder, heads = make_decoder()
    states = decoder(**make_inputs(), box_deltas=by(heads))
    assert not states.input_references[0].requires_grad
    for index in (1, 2):
        parameters = [[*head.parameters()] for head in heads]
        total = states.input_references[index].sum()
        gradients = [torch.autograd.grad(total, p, retain_graph=True, allow_unused=True) for p in parameters]
        for head, found in enumerate(gradients):
            reached = [x is not None and x.abs().sum() > 0 for x in found]
            # The gradient reaches only the head of the layer before, not all heads.
            assert all(reached) if head == index - 1 else not any(reached)


def test_output_references_have_no_gradient():
    decoder, heads = make_decoder()
    states = decoder(**make_inputs(), box_deltas=by(heads))
    assert not any(x.requires_grad for x in states.output_references)
    for index in (1, 2):
        assert torch.equal(states.output_references[index - 1], states.input_references[index])


def test_hidden_states_do_not_depend_on_earlier_heads_for_the_gradient():
    decoder, heads = make_decoder()
    states = decoder(**make_inputs(), box_deltas=by(heads))
    parameters = [p for head in heads for p in head.parameters()]
    gradients = torch.autograd.grad(states.last_hidden_state.square().sum(), parameters, allow_unused=True)
    assert all(x is None for x in gradients)


def test_without_heads_references_stay_where_they_are():
    decoder, _ = make_decoder()
    inputs = make_inputs()
    states = decoder(**inputs)
    assert len(states.hidden_states) == LAYERS
    for x in (*states.input_references, *states.output_references):
        assert torch.equal(x, inputs["references"])


@pytest.mark.parametrize("scale_positions", [False, True])
def test_boxes_are_scaled_to_the_padded_map_and_embedded(scale_positions):
    decoder, _ = make_decoder()
    calls = []
    decoder.layers[0].register_forward_pre_hook(lambda module, args: calls.append(args))
    inputs = make_inputs(ratios=(0.5, 0.75))
    decoder(**inputs, scale_positions=scale_positions)
    scaled = inputs["references"] * torch.tensor([0.5, 0.75, 0.5, 0.75])
    position, references = calls[0][1], calls[0][2]
    torch.testing.assert_close(references, scaled[:, :, None].expand(-1, -1, len(SHAPES), -1))
    boxes = scaled if scale_positions else inputs["references"]
    embedding = box_position_embedding(boxes, WIDTH // 2, 10000)
    torch.testing.assert_close(position, decoder.reference_points_head(embedding), rtol=0, atol=TOLERANCE)


def test_masked_queries_do_not_affect_each_other():
    decoder, heads = make_decoder()
    inputs = make_inputs()
    mask = torch.zeros(1, 1, QUERIES, QUERIES).bool()
    mask[..., :2, :2], mask[..., 2:, 2:] = True, True
    found = decoder(**inputs, query_mask=mask, box_deltas=by(heads))
    inputs["queries"] = torch.cat((inputs["queries"][:, :2], -inputs["queries"][:, 2:]), dim=1)
    again = decoder(**inputs, query_mask=mask, box_deltas=by(heads))
    torch.testing.assert_close(found.last_hidden_state[:, :2], again.last_hidden_state[:, :2], rtol=0, atol=TOLERANCE)
    assert not torch.allclose(found.last_hidden_state[:, 2:], again.last_hidden_state[:, 2:], atol=1e-2)


def test_references_stay_float32_in_bfloat16():
    decoder, heads = make_decoder()
    decoder, heads = decoder.bfloat16(), [head.bfloat16() for head in heads]
    inputs = make_inputs()
    for name in ("queries", "vision", "text"):
        inputs[name] = inputs[name].bfloat16()
    states = decoder(**inputs, box_deltas=by(heads))
    assert states.last_hidden_state.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in (*states.input_references, *states.output_references))
