"""Claims about attention: every implementation equals the formula, and masked keys have no influence."""

import math

import pytest
import torch

from gdino_hf.model.attention import MultiheadAttention, attend
from gdino_hf.model.configuration_gdino import GDinoConfig

WIDTH, HEADS = 8, 2
IMPLEMENTATIONS = ("eager", "sdpa")
# float64 against float64, in another order of summation.
TOLERANCE = 1e-10


def make_config(implementation, **changes):
    config = GDinoConfig(d_model=WIDTH, encoder_attention_heads=2, decoder_attention_heads=2, **changes)
    config._attn_implementation = implementation
    return config


def make_attention(implementation, **changes):
    torch.manual_seed(0)
    return MultiheadAttention(make_config(implementation, **changes), HEADS).double().eval()


def make_inputs():
    generator = torch.Generator().manual_seed(1)
    sizes = ((2, 3, WIDTH), (2, 5, WIDTH), (2, 5, WIDTH))
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def looped(query, key, value, mask):
    """Attend weight by weight in one sample: (M, Q, Dh), (M, N, Dh), (M, N, Dv) and mask (Q, N) to (Q, M * Dv)."""
    heads, num_queries, size = query.shape
    rows = []
    for q in range(num_queries):
        parts = []
        for m in range(heads):
            seen = [n for n in range(key.shape[1]) if mask[q][n]]
            powers = [math.exp(float(query[m, q] @ key[m, n]) / math.sqrt(size)) for n in seen]
            parts.append(sum(p / sum(powers) * value[m, n] for p, n in zip(powers, seen, strict=True)))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize("value_size", [4, 6])
def test_attend_equals_the_formula_with_a_mask_per_pair(implementation, value_size):
    generator = torch.Generator().manual_seed(2)
    query, key, value = (
        torch.randn(2, HEADS, n, d, generator=generator, dtype=torch.float64)
        for n, d in ((3, 4), (5, 4), (5, value_size))
    )
    mask = torch.rand(2, 1, 3, 5, generator=generator) > 0.4
    mask[..., 0] = True
    module = make_attention("eager")
    found, _ = attend(module, make_config(implementation), query, key, value, mask)
    assert found.shape == (2, 3, HEADS * value_size)
    for b in range(2):
        expected = looped(query[b], key[b], value[b], mask[b, 0])
        assert torch.allclose(found[b], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_multihead_attention_equals_the_formula(implementation, masked):
    attention = make_attention(implementation)
    queries, keys, values = make_inputs()
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]]).bool()
    found, _ = attention(queries, keys, values, keep[:, None, None, :] if masked else None)

    def project(layer, x):
        rows = [layer.weight.detach() @ row + layer.bias.detach() for row in x]
        return torch.stack([torch.stack([row[m * 4 : (m + 1) * 4] for row in rows]) for m in range(HEADS)])

    for b in range(2):
        mask = [keep[b] if masked else torch.ones(5)] * 3
        parts = (
            project(attention.query, queries[b]),
            project(attention.key, keys[b]),
            project(attention.value, values[b]),
        )
        expected = looped(*parts, mask) @ attention.out_proj.weight.T + attention.out_proj.bias
        assert torch.allclose(found[b], expected, rtol=0, atol=TOLERANCE)


def test_implementations_agree_in_value_and_gradient():
    results = []
    for implementation in IMPLEMENTATIONS:
        attention, inputs = make_attention(implementation), [x.requires_grad_() for x in make_inputs()]
        mask = torch.tensor([1, 1, 0, 1, 1]).bool()[None, None, None]
        output, _ = attention(*inputs, mask)
        results.append([output, *torch.autograd.grad(output.square().sum(), [*inputs, *attention.parameters()])])
    for eager, sdpa in zip(*results, strict=True):
        assert torch.allclose(eager, sdpa, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masked_keys_have_no_influence(implementation):
    attention, (queries, keys, values) = make_attention(implementation), make_inputs()
    mask = torch.tensor([1, 1, 1, 0, 0]).bool()[None, None, None]
    found, _ = attention(queries, keys, values, mask)
    keys[:, 3:], values[:, 3:] = 30.0, -1000.0
    assert torch.equal(found, attention(queries, keys, values, mask)[0])
    short, _ = attention(queries, keys[:, :3], values[:, :3])
    assert torch.allclose(found, short, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_visible_key_is_copied(implementation):
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, HEADS, 4, 4, generator=generator) for _ in range(3))
    found, _ = attend(make_attention("eager"), make_config(implementation), query, key, value, torch.eye(4).bool())
    assert torch.allclose(found, value.transpose(1, 2).flatten(2), atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_acts_in_training_only(implementation):
    attention, inputs = make_attention(implementation, attention_dropout=0.5), make_inputs()
    assert torch.equal(attention(*inputs)[0], attention(*inputs)[0])
    attention.train()
    assert not torch.equal(attention(*inputs)[0], attention(*inputs)[0])


def test_published_models_have_eight_heads_of_32():
    attention = MultiheadAttention(GDinoConfig(), GDinoConfig().decoder_attention_heads)
    assert attention.num_heads == 8
    assert attention.query.weight.shape == (256, 256)
