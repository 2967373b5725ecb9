"""Claims about the box head and the class head: each similarity equals its formula, computed token by token."""

import copy
import math

import pytest
import torch

from gdino_hf.model.configuration_gdino import GDinoConfig
from gdino_hf.model.heads import MLP, PRIOR_BIAS, BoxHead, ContrastiveHead
from gdino_hf.model.modeling_gdino import GDinoModel

WIDTH, MAX_TEXT_LEN = 8, 11
# Sums of 8 float32 products near 1, divided by a temperature of at least 0.1.
TOLERANCE = 1e-5
KINDS = ("dot", "scaled_bias", "cosine")


def make_head(kind, temperature=0.25, bias=-1.5):
    config = GDinoConfig(d_model=WIDTH, max_text_len=MAX_TEXT_LEN, class_head=kind, class_head_temperature=temperature)
    head = ContrastiveHead(config)
    if kind != "dot":
        torch.nn.init.constant_(head.bias, bias)
    return head


def formula(kind, query, token, temperature=0.25, bias=-1.5):
    product = sum(a * b for a, b in zip(query, token, strict=True))
    if kind == "dot":
        return product
    if kind == "scaled_bias":
        return product / math.sqrt(len(query)) + bias
    lengths = math.sqrt(sum(a * a for a in query)) * math.sqrt(sum(b * b for b in token))
    return product / lengths / temperature + bias


def random_inputs():
    generator = torch.Generator().manual_seed(0)
    queries, text = torch.randn(2, 3, WIDTH, generator=generator), torch.randn(2, 5, WIDTH, generator=generator)
    return queries, text, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_formula_and_are_minus_infinity_outside_the_prompt(kind):
    queries, text, mask = random_inputs()
    logits = make_head(kind)(queries, text, mask)
    assert logits.shape == (2, 3, MAX_TEXT_LEN)
    for b in range(2):
        for q in range(3):
            for t in range(MAX_TEXT_LEN):
                if t < 5 and mask[b, t]:
                    expected = formula(kind, queries[b, q].tolist(), text[b, t].tolist())
                    assert logits[b, q, t].item() == pytest.approx(expected, abs=TOLERANCE)
                else:
                    assert logits[b, q, t].item() == -math.inf


def test_known_values():
    query, token = torch.tensor([[[3.0, 4, 0, 0, 0, 0, 0, 0]]]), torch.tensor([[[0.0, 2, 0, 0, 0, 0, 0, 0]]])
    found = {kind: make_head(kind, temperature=0.5, bias=1.0).similarity(query, token).item() for kind in KINDS}
    # q.t = 8, |q| = 5, |t| = 2, D = 8
    expected = {"dot": 8.0, "scaled_bias": 8 / math.sqrt(8) + 1, "cosine": 0.8 / 0.5 + 1}
    assert found == pytest.approx(expected, abs=TOLERANCE)


def test_cosine_ignores_lengths_and_the_others_do_not():
    queries, text, _ = random_inputs()
    for kind in KINDS:
        head = make_head(kind)
        same = torch.allclose(head.similarity(queries, text), head.similarity(7 * queries, 0.1 * text), atol=TOLERANCE)
        assert same == (kind == "cosine"), kind


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_a_query_equal_to_the_token_scores_one_over_the_temperature(temperature):
    query = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    score = make_head("cosine", temperature=temperature, bias=0.0).similarity(query, query)
    assert score.item() == pytest.approx(1 / temperature, rel=1e-5)


def test_prior_bias_gives_a_probability_of_one_in_a_hundred():
    assert torch.tensor(PRIOR_BIAS, dtype=torch.float64).sigmoid().item() == pytest.approx(0.01, abs=1e-12)
    config = GDinoConfig(d_model=WIDTH, class_head="scaled_bias")
    scores = ContrastiveHead(config).similarity(torch.zeros(1, 1, WIDTH), torch.zeros(1, 2, WIDTH))
    assert scores.sigmoid().flatten().tolist() == pytest.approx([0.01, 0.01], abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "names"),
    [("dot", set()), ("scaled_bias", {"bias"}), ("cosine", {"bias", "log_temperature"})],
)
def test_all_parameters_of_each_kind_get_a_gradient(kind, names):
    head = make_head(kind)
    assert {name for name, _ in head.named_parameters()} == names
    queries, text, mask = random_inputs()
    logits = head(queries.requires_grad_(), text.requires_grad_(), mask)
    logits[logits.isfinite()].square().sum().backward()
    for tensor in (queries, text, *head.parameters()):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_query_selection_scores_with_the_same_similarity(kind, tiny_config, tiny_tokenizer):
    config = copy.deepcopy(tiny_config)
    config.class_head, config.class_head_temperature = kind, 0.25
    torch.manual_seed(0)
    model = GDinoModel(config).eval()
    assert isinstance(model.encoder_output_class_embed, ContrastiveHead)
    prompt = tiny_tokenizer(["cat. remote control."], return_tensors="pt")
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        outputs = model(pixels, prompt["input_ids"], prompt["attention_mask"], output_hidden_states=True)
        vision, text = outputs.encoder_last_hidden_state_vision, outputs.encoder_last_hidden_state_text
        features = model.enc_output_norm(model.enc_output(vision))
    bias = PRIOR_BIAS if kind != "dot" else 0.0
    found = outputs.enc_outputs_class[0, :, : text.shape[1]]
    # This token in the middle of the finest level has a proposal; tokens without one are zeroed before projection.
    for index in (27, 36):
        for t in range(text.shape[1]):
            expected = formula(kind, features[0, index].double().tolist(), text[0, t].double().tolist(), bias=bias)
            assert found[index, t].item() == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_mlp_is_linear_layers_with_relu_between():
    torch.manual_seed(0)
    mlp = MLP(3, 5, 2, 3)
    assert [tuple(layer.weight.shape) for layer in mlp.layers] == [(5, 3), (5, 5), (2, 5)]
    values = x = torch.randn(3).tolist()
    for index, layer in enumerate(mlp.layers):
        rows, bias = layer.weight.tolist(), layer.bias.tolist()
        values = [sum(w * v for w, v in zip(row, values, strict=True)) + b for row, b in zip(rows, bias, strict=True)]
        if index < 2:
            values = [max(0.0, v) for v in values]
    assert mlp(torch.tensor([[x]]))[0, 0].tolist() == pytest.approx(values, abs=TOLERANCE)
    # The output must be able to be negative: a box must be able to move left.
    assert mlp(torch.randn(50, 3)).min() < 0


def test_box_head_gives_four_numbers_from_three_layers():
    head = BoxHead(GDinoConfig(d_model=WIDTH))
    assert [tuple(layer.weight.shape) for layer in head.layers] == [(WIDTH, WIDTH), (WIDTH, WIDTH), (4, WIDTH)]
    assert head(torch.zeros(2, 3, WIDTH)).shape == (2, 3, 4)


class Adapter(torch.nn.Module):
    """A layer with a low-rank correction that exposes the layer's own weight and bias, as adapters do."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_on_the_last_box_layer_has_an_effect(dtype):
    torch.manual_seed(0)
    head = BoxHead(GDinoConfig(d_model=WIDTH)).to(dtype)
    x = torch.randn(3, WIDTH, dtype=dtype)
    before = head(x)
    adapter = Adapter(head.layers[-1]).to(dtype)
    head.layers[-1] = adapter
    hidden = x
    for layer in head.layers[:-1]:
        hidden = layer(hidden).relu()
    after = head(x)
    assert after.dtype == torch.float32
    # Two bfloat16 layers round values below 1 to 2^-8 each; float32 rounding is far smaller.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-6
    correction = adapter.up(adapter.down(hidden)).float()
    torch.testing.assert_close(after - before, correction, atol=tolerance, rtol=0)
    assert correction.abs().max() > 4 * tolerance


def test_a_dynamically_quantized_model_still_detects(tiny_model):
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(tiny_model), {torch.nn.Linear}, dtype=torch.qint8)
    special = tiny_model.config.special_token_ids
    inputs = {
        "pixel_values": torch.randn(1, 3, 64, 64),
        "input_ids": torch.tensor([[special[0], 60, *special[2:0:-1]]]),
    }
    with torch.no_grad():
        boxes = quantized(**inputs).pred_boxes
    assert torch.isfinite(boxes).all()
    assert type(quantized.bbox_embed[0].layers[-1]) is not torch.nn.Linear
