"""Claims about fusion: both kinds equal their equations, computed head by head and token by token."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gdino_hf.model.configuration_gdino import GDinoConfig
from gdino_hf.model.fusion import BiAttention, FusionLayer, drop_path

WIDTH, HEADS, INNER = 8, 2, 12
# float64 sums in a different order.
TOLERANCE = 1e-10


def make_config(**changes):
    config = GDinoConfig(
        d_model=WIDTH,
        encoder_attention_heads=2 * HEADS,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * INNER,
        **{"fusion_init_value": 0.3, "fusion_droppath": 0.0, **changes},
    )
    config._attn_implementation = "eager"
    return config


def make_layer(**changes):
    torch.manual_seed(0)
    layer = FusionLayer(make_config(**changes)).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def make_inputs():
    generator = torch.Generator().manual_seed(1)
    vision = torch.randn(2, 6, WIDTH, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 4, WIDTH, generator=generator, dtype=torch.float64)
    vision_mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    text_mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    return vision, text, vision_mask, text_mask


def linear(module, vector):
    return module.weight.detach() @ vector + module.bias.detach()


def normalize(module, vector):
    centred = vector - vector.mean()
    scale = torch.sqrt((centred**2).mean() + module.eps)
    return (centred / scale * module.weight + module.bias).detach()


def softmax(scores):
    largest = max(scores)
    powers = [math.exp(score - largest) for score in scores]
    return [power / sum(powers) for power in powers]


def looped_attention(attn, vision, text, vision_mask, text_mask):
    """Compute bi-attention of one sample with loops: one score matrix, normalized over text and over image."""
    size = INNER // HEADS
    query, key = [linear(attn.vision_proj, v) for v in vision], [linear(attn.text_proj, t) for t in text]
    vision_value = [linear(attn.values_vision_proj, v) for v in vision]
    text_value = [linear(attn.values_text_proj, t) for t in text]
    to_vision = [torch.zeros(INNER, dtype=torch.float64) for _ in vision]
    to_text = [torch.zeros(INNER, dtype=torch.float64) for _ in text]
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = [[float(q[part] @ k[part]) / math.sqrt(size) for k in key] for q in query]
        for s in range(len(vision)):
            real = [t for t in range(len(text)) if text_mask[t]]
            for t, weight in zip(real, softmax([scores[s][t] for t in real]), strict=True):
                to_vision[s][part] += weight * text_value[t][part]
        for t in range(len(text)):
            real = [s for s in range(len(vision)) if vision_mask[s]]
            for s, weight in zip(real, softmax([scores[s][t] for s in real]), strict=True):
                to_text[t][part] += weight * vision_value[s][part]
    to_vision = [linear(attn.out_vision_proj, v) for v in to_vision]
    return torch.stack(to_vision), torch.stack([linear(attn.out_text_proj, t) for t in to_text])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_bi_attention_equals_its_equations(implementation):
    layer = make_layer()
    layer.attn.config._attn_implementation = implementation
    vision, text, vision_mask, text_mask = make_inputs()
    found = layer(vision, text, vision_mask, text_mask)[:2]
    for b in range(2):
        v = torch.stack([normalize(layer.layer_norm_vision, x) for x in vision[b]])
        t = torch.stack([normalize(layer.layer_norm_text, x) for x in text[b]])
        to_vision, to_text = looped_attention(layer.attn, v, t, vision_mask[b], text_mask[b])
        # The residual is added to the normalized features, not to the input.
        assert torch.allclose(found[0][b], v + layer.vision_param * to_vision, rtol=0, atol=TOLERANCE)
        assert torch.allclose(found[1][b], t + layer.text_param * to_text, rtol=0, atol=TOLERANCE)


def test_gated_fusion_equals_its_equations_in_both_directions():
    layer = make_layer(fusion_type="gated")
    vision, text, vision_mask, text_mask = make_inputs()
    found = layer(vision, text, vision_mask, text_mask)[:2]

    def mix(gate, own, other):
        first, second = gate[0], gate[2]
        inner = linear(first, torch.cat([own, other])).clamp(min=0)
        share = 1 / (1 + torch.exp(-linear(second, inner)))
        return share * own + (1 - share) * other

    for b in range(2):
        v = torch.stack([normalize(layer.layer_norm_vision, x) for x in vision[b]])
        t = torch.stack([normalize(layer.layer_norm_text, x) for x in text[b]])
        to_vision, to_text = looped_attention(layer.attn, v, t, vision_mask[b], text_mask[b])
        expected_vision = torch.stack([mix(layer.gate_vision, *pair) for pair in zip(v, to_vision, strict=True)])
        expected_text = torch.stack([mix(layer.gate_text, *pair) for pair in zip(t, to_text, strict=True)])
        assert torch.allclose(found[0][b], expected_vision, rtol=0, atol=TOLERANCE)
        assert torch.allclose(found[1][b], expected_text, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("logit", "side"), [(40.0, "own"), (-40.0, "other"), (0.0, "half")])
def test_an_extreme_gate_selects_one_side(logit, side):
    layer = make_layer(fusion_type="gated")
    with torch.no_grad():
        for gate in (layer.gate_vision, layer.gate_text):
            gate[2].weight.zero_()
            gate[2].bias.fill_(logit)
    vision, text, vision_mask, text_mask = make_inputs()
    own = layer.layer_norm_vision(vision), layer.layer_norm_text(text)
    other = layer.attn(*own, vision_mask, text_mask)[:2]
    found = layer(vision, text, vision_mask, text_mask)[:2]
    for x, mine, theirs in zip(found, own, other, strict=True):
        expected = {"own": mine, "other": theirs, "half": (mine + theirs) / 2}[side]
        assert torch.allclose(x, expected, rtol=0, atol=TOLERANCE)


def test_scale_of_zero_leaves_the_normalized_features():
    layer = make_layer()
    torch.nn.init.zeros_(layer.vision_param)
    torch.nn.init.zeros_(layer.text_param)
    vision, text, vision_mask, text_mask = make_inputs()
    new_vision, new_text, _ = layer(vision, text, vision_mask, text_mask)
    assert torch.equal(new_vision, layer.layer_norm_vision(vision))
    assert torch.equal(new_text, layer.layer_norm_text(text))


@pytest.mark.parametrize("kind", ["bi_attention", "gated"])
def test_padding_does_not_affect_real_tokens(kind):
    layer = make_layer(fusion_type=kind)
    vision, text, vision_mask, text_mask = make_inputs()
    found = layer(vision, text, vision_mask, text_mask)[:2]
    vision[~vision_mask], text[~text_mask] = 50.0, -70.0
    again = layer(vision, text, vision_mask, text_mask)[:2]
    assert torch.equal(found[0][vision_mask], again[0][vision_mask])
    assert torch.equal(found[1][text_mask], again[1][text_mask])
    unmasked = layer(vision[:1], text[:1], None, text_mask[:1])[:2]
    assert torch.allclose(unmasked[0], again[0][:1], rtol=0, atol=TOLERANCE)
    assert torch.allclose(unmasked[1], again[1][:1], rtol=0, atol=TOLERANCE)


def test_heads_and_width_are_halves_of_the_encoders():
    attn = BiAttention(GDinoConfig())
    assert attn.num_heads == 4
    assert attn.vision_proj.weight.shape == (1024, 256)
    assert attn.out_text_proj.weight.shape == (256, 1024)


def test_layer_scale_starts_at_the_configured_value():
    layer = FusionLayer(GDinoConfig())
    assert layer.vision_param.shape == layer.text_param.shape == (256,)
    assert (layer.vision_param == 1e-4).all()
    assert (layer.text_param == 1e-4).all()
    assert layer.drop_path == 0.1


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    x = 1 + torch.rand(4000, 3, 2)
    dropped = drop_path(x, 0.2, training=True)
    gone = (dropped == 0).flatten(1).all(1)
    assert torch.allclose(dropped[~gone], x[~gone] / 0.8)
    # The share of 4000 samples at 0.2 has a standard deviation of 0.0063; four of them are below 0.026.
    assert gone.float().mean().item() == pytest.approx(0.2, abs=0.026)
    assert dropped.mean().item() == pytest.approx(x.mean().item(), abs=4 * 1.5 * 0.0063 / 0.8)


def test_drop_path_does_nothing_outside_of_training_or_at_zero():
    x = torch.rand(5, 2)
    assert drop_path(x, 0.9, training=False) is x
    assert drop_path(x, 0.0, training=True) is x


def test_a_dropped_branch_leaves_the_normalized_features():
    layer = make_layer(fusion_droppath=0.5).train()
    vision, text, vision_mask, text_mask = (x[:1].expand(64, *x.shape[1:]) for x in make_inputs())
    new_vision, new_text, _ = layer(vision, text, vision_mask, text_mask)
    normal = F.layer_norm(vision, (WIDTH,), layer.layer_norm_vision.weight, layer.layer_norm_vision.bias)
    same_vision = (new_vision - normal).abs().amax((1, 2)) < TOLERANCE
    same_text = (new_text - layer.layer_norm_text(text)).abs().amax((1, 2)) < TOLERANCE
    assert 0 < same_vision.sum() < 64
    assert 0 < same_text.sum() < 64
    # The branches of image and text are dropped independently.
    assert (same_vision != same_text).any()
    kept = layer.eval()(vision[:1], text[:1], vision_mask[:1], text_mask[:1])[0] - normal[:1]
    assert torch.allclose(new_vision[~same_vision] - normal[~same_vision], 2 * kept, rtol=0, atol=TOLERANCE)


class Adapter(nn.Module):
    """A layer that replaces a projection, as adapters and quantized layers do."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Linear(WIDTH, 2).double(), nn.Linear(2, INNER).double()

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def test_a_projection_that_was_replaced_is_called():
    attn = make_layer().attn
    inputs = make_inputs()
    before = attn(*inputs)[:2]
    adapter = Adapter(attn.vision_proj)
    attn.vision_proj = adapter
    for parameter in (*adapter.down.parameters(), *adapter.up.parameters()):
        nn.init.zeros_(parameter)
    for ours, theirs in zip(attn(*inputs)[:2], before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    nn.init.ones_(adapter.up.bias)
    nn.init.ones_(adapter.down.bias)
    nn.init.ones_(adapter.up.weight)
    assert not torch.allclose(attn(*inputs)[0], before[0])
    attn(*inputs)[0].sum().backward()
    assert adapter.up.weight.grad.abs().sum() > 0


def test_dropout_of_fusion_keeps_the_mean():
    """The attention weights that dropout keeps are scaled up, and the bias of the values with them."""
    attn = make_layer(fusion_dropout=0.3).attn
    inputs = make_inputs()
    expected = attn(*inputs)[:2]
    attn.train()
    torch.manual_seed(0)
    with torch.no_grad():
        runs = [attn(*inputs)[:2] for _ in range(3000)]
    for side in (0, 1):
        mean = torch.stack([run[side] for run in runs]).mean(0)
        # Standard error of the mean of 3000 runs whose standard deviation is below 1.
        torch.testing.assert_close(mean, expected[side], rtol=0, atol=0.1)
