"""Claims about optimize_for_inference: equal outputs, equal saved weights, and a clear refusal to train."""

import copy
import logging
import re
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import ResNetConfig

from gdino_hf import GDinoModel
from gdino_hf.inference import arithmetic, onednn
from gdino_hf.inference import optimize as optimize_module
from gdino_hf.inference.arithmetic import LinearKinds
from gdino_hf.inference.int8_linear import Int8Linear, has_int8
from gdino_hf.inference.onednn import can_pack
from gdino_hf.inference.packed_attention import PackedMSDeformAttn
from gdino_hf.inference.packed_encoder import PackedDeformableLayer
from gdino_hf.inference.packed_linear import PackedLinear, share_state
from gdino_hf.inference.packed_swin import PackedSwin
from gdino_hf.model.heads import BoxHead, Float32Linear
from gdino_hf.model.ms_deform_attn import MSDeformAttn
from random_models import make_random_model

# float32 sums of a few dozen products in another order, through a dozen layers.
ROUNDING = 1e-4
# bfloat16 keeps 8 bits, and the two models round at different places.
HALF_ROUNDING = 0.1

# Factors are rounded to 8 bits of their row's largest value, a fraction of a percent of a layer's output.
INT8_ROUNDING = 0.02
needs_int8 = pytest.mark.skipif(not has_int8(), reason="no 8-bit layers on this CPU")

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="this build of torch has no oneDNN")


def lively(config):
    """A random model in which every weight matters; boxes of a newly initialized one ignore the image."""
    return make_random_model(config, perturb=lambda name: "backbone" not in name or "bias_table" in name)


def make_inputs(batch=2, height=224, width=290, **extra):
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[2, 60, 7, 61, 62, 7, 3]]).repeat(batch, 1)
    return {
        "pixel_values": torch.randn(batch, 3, height, width, generator=generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **extra,
    }


def assert_same(ours, theirs, tolerance=ROUNDING):
    finite = torch.isfinite(theirs.logits)
    assert torch.equal(torch.isfinite(ours.logits), finite)
    assert theirs.pred_boxes.std(dim=1).min() > 1e-3
    torch.testing.assert_close(ours.logits[finite], theirs.logits[finite], rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.pred_boxes, theirs.pred_boxes, rtol=0, atol=tolerance)


EXTRA = {
    "unpadded": {},
    "padded": {"pixel_mask": torch.ones(2, 224, 290).index_fill_(2, torch.arange(200, 290), 0)},
    "sizes": {"image_sizes": [(224, 290), (150, 201)]},
}


@pytest.mark.parametrize("extra", EXTRA)
def test_outputs_stay_the_same(tiny_config, extra):
    plain = lively(tiny_config)
    optimized = copy.deepcopy(plain).optimize_for_inference()
    inputs = make_inputs(**EXTRA[extra])
    with torch.inference_mode():
        assert_same(optimized(**inputs), plain(**inputs))


def test_every_part_is_packed(tiny_config):
    model = lively(tiny_config).optimize_for_inference()
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    assert any(type(module) is PackedMSDeformAttn for module in model.modules())
    assert isinstance(model.model.backbone.fast_forward, PackedSwin)
    # A box head's last layer computes in float32 whatever the model's dtype, so it stays as it is.
    plain = {
        name.split(".")[1]
        for name, module in model.named_modules()
        if type(module) is nn.Linear and "fusion" not in name and not re.search(r"bbox_embed.*layers\.2$", name)
    }
    # The text side runs once per prompt and stays unpacked; offsets and logits run as one joint layer.
    assert plain <= {"text_backbone", "text_projection", "backbone", "encoder", "decoder"}


def test_every_box_head_of_a_packed_bfloat16_model_computes_deltas_in_float32(tiny_config):
    """The head of the encoder's proposals too, although it is packed by itself and not as a part of a larger module."""
    model = lively(tiny_config)
    optimize_module.pack_model(model, LinearKinds())
    model.bfloat16()
    heads = {name: module for name, module in model.named_modules() if isinstance(module, BoxHead)}
    assert "model.encoder_output_bbox_embed" in heads
    queries = torch.randn(1, 8, tiny_config.d_model, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name, head in heads.items():
        assert [type(layer) for layer in head.layers] == [PackedLinear, PackedLinear, Float32Linear], name
        with torch.no_grad():
            deltas = head(queries)
        assert (deltas != deltas.bfloat16().float()).any(), name


def test_resnet_backbone_and_bare_model_are_optimized_too(tiny_config):
    config = copy.deepcopy(tiny_config)
    config.backbone_config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"]
    )
    plain = lively(config)
    inputs = make_inputs()
    with torch.inference_mode():
        assert_same(copy.deepcopy(plain).optimize_for_inference()(**inputs), plain(**inputs))
    torch.manual_seed(0)
    bare = GDinoModel(copy.deepcopy(tiny_config)).eval()
    with torch.inference_mode():
        before = bare(**inputs).last_hidden_state
        after = bare.optimize_for_inference()(**inputs).last_hidden_state
    torch.testing.assert_close(after, before, rtol=0, atol=ROUNDING)


def far(ours, theirs):
    """Mean distance of two tensors relative to the mean magnitude."""
    return ((ours.float() - theirs).abs().mean() / theirs.abs().mean()).item()


@needs_int8
@pytest.mark.parametrize("extra", EXTRA)
def test_int8_stays_close(tiny_config, extra):
    plain = lively(tiny_config)
    optimized = copy.deepcopy(plain).optimize_for_inference(int8=True)
    inputs = make_inputs(**EXTRA[extra])
    with torch.inference_mode():
        ours, theirs = optimized.model(**inputs), plain.model(**inputs)
        images = [model.model.get_image_features(inputs["pixel_values"]).feature_maps for model in (optimized, plain)]
    distance = far(ours.encoder_last_hidden_state_vision, theirs.encoder_last_hidden_state_vision)
    assert 0 < distance < INT8_ROUNDING
    assert all(0 < far(*maps) < INT8_ROUNDING for maps in zip(*images, strict=True))


@needs_int8
def test_int8_swin_with_published_head_width_stays_close(tiny_config):
    """Heads of 32 channels, as in every published Swin, take the fused path over the windows."""
    config = copy.deepcopy(tiny_config)
    config.backbone_config.embed_dim, config.backbone_config.num_heads = 32, [1, 2, 4, 8]
    config.backbone_config.hidden_size = 256
    plain = lively(config)
    optimized = copy.deepcopy(plain).optimize_for_inference(int8=True)
    pixels = make_inputs()["pixel_values"]
    with torch.inference_mode():
        ours, theirs = (model.get_image_features(pixels).feature_maps for model in (optimized, plain))
    assert all(0 < far(*maps) < INT8_ROUNDING for maps in zip(ours, theirs, strict=True))


@needs_int8
def test_int8_covers_image_tokens_and_queries_but_not_text_boxes_and_scores(tiny_config):
    optimized = lively(tiny_config).optimize_for_inference(int8=True)
    model = optimized.model
    assert {type(layer.deformable_layer) for layer in model.encoder.layers} == {PackedDeformableLayer}
    assert model.backbone.fast_forward.kind is Int8Linear
    linear = {name: type(module) for name, module in optimized.named_modules() if isinstance(module, PackedLinear)}
    for name, kind in linear.items():
        eight = "deformable_layer" in name or "decoder.layers" in name
        assert (kind is Int8Linear) == eight, name
    parts = {name.rsplit(".", 1)[-1] for name, kind in linear.items() if kind is Int8Linear}
    assert {"fc1", "fc2", "value_proj", "output_proj"} < parts


@needs_int8
def test_int8_saves_published_weights_and_follows_new_ones(tiny_config):
    plain = lively(tiny_config)
    optimized = copy.deepcopy(plain).optimize_for_inference(int8=True)
    inputs = make_inputs(height=64, width=96)
    with torch.inference_mode():
        before = optimized.model(**inputs).encoder_last_hidden_state_vision
        again = copy.deepcopy(optimized).model(**inputs).encoder_last_hidden_state_vision
    assert torch.equal(before, again)
    ours, theirs = optimized.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    optimized.load_state_dict(
        {key: 0.9 * value for key, value in theirs.items() if value.is_floating_point()}, strict=False
    )
    other = copy.deepcopy(plain)
    other.load_state_dict(optimized.state_dict())
    with torch.inference_mode():
        ours, theirs = (model.model(**inputs).encoder_last_hidden_state_vision for model in (optimized, other))
    assert far(ours, theirs) < INT8_ROUNDING
    assert far(before, theirs) > 10 * far(ours, theirs)


@needs_int8
def test_int8_model_cast_to_another_dtype_computes_each_part_once(tiny_config):
    plain = lively(tiny_config)
    optimized = copy.deepcopy(plain).optimize_for_inference(int8=True).bfloat16()
    calls = []
    for layer in optimized.model.encoder.layers:
        attention = layer.deformable_layer.self_attn
        attention.value_proj.register_forward_hook(lambda _, inputs, output: calls.append(output.shape[:-1].numel()))
    inputs = make_inputs(height=64, width=96)
    with torch.inference_mode():
        theirs = plain.model(**inputs).encoder_last_hidden_state_vision
        ours = optimized.model(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()})
    assert far(ours.encoder_last_hidden_state_vision, theirs) < HALF_ROUNDING
    assert sum(calls) == theirs.shape[:2].numel() * len(optimized.model.encoder.layers)


@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=needs_int8)])
def test_threads_share_a_model_from_its_first_forward(tiny_config, int8):
    """Packed weights, joint layers and cached prompts are created while other threads read them."""
    optimized = lively(tiny_config).optimize_for_inference(int8=int8)
    # Three prompts compete for two places, so threads evict what others have just looked up.
    optimized.model.text_feature_cache.size = 2
    prompts = [torch.tensor([[2, 60 + i % 3, 7, 61, 62, 7, 3]]) for i in range(6)]
    inputs = make_inputs(batch=1, height=64, width=96)
    start, found = threading.Barrier(len(prompts)), {}

    def work(number):
        start.wait()
        with torch.inference_mode():
            outputs = [optimized(**{**inputs, "input_ids": prompts[number]}) for _ in range(3)]
        found[number] = outputs[-1]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(found) == len(prompts), "a thread failed"
    with torch.inference_mode():
        for number, prompt in enumerate(prompts):
            assert_same(found[number], optimized(**{**inputs, "input_ids": prompt}))


def test_second_call_changes_nothing(tiny_config):
    model = lively(tiny_config).optimize_for_inference()
    modules = dict(model.named_modules())
    assert model.optimize_for_inference(int8=True) is model
    assert dict(model.named_modules()) == modules


def test_int8_with_an_unsupported_dtype_is_refused(tiny_config):
    model = lively(tiny_config).half()
    with pytest.raises(ValueError, match="float32 and bfloat16 models on a CPU"):
        model.optimize_for_inference(int8=True)


@pytest.mark.parametrize("int8", [None, False], ids=["left to the CPU", "forbidden"])
@pytest.mark.parametrize("widened", [False, True])
def test_bfloat16_stays_close_and_becomes_float32_where_that_is_faster(tiny_config, monkeypatch, caplog, widened, int8):
    if not can_pack(torch.bfloat16):
        pytest.skip("this build of torch packs no bfloat16 weights")
    speeds = {"float32": 100.0, "bfloat16": 10.0 if widened else 200.0}
    speeds |= {"int8": 250.0} if has_int8() else {}
    monkeypatch.setattr(arithmetic, "product_speeds", lambda: speeds)
    plain = lively(tiny_config)
    with caplog.at_level("WARNING"):
        optimized = copy.deepcopy(plain).bfloat16().optimize_for_inference(int8)
    eight = any(isinstance(module, Int8Linear) for module in optimized.modules())
    assert eight == (widened and int8 is None and has_int8())
    assert ("8-bit" in caplog.text) == eight
    assert ("slow at bfloat16" in caplog.text) == widened
    assert ("float32 100, bfloat16 10" in caplog.text) == widened
    inputs = make_inputs()
    with torch.inference_mode():
        ours = optimized.model(**inputs).encoder_last_hidden_state_vision.float()
        theirs = plain.model(**inputs).encoder_last_hidden_state_vision
        assert optimized(**inputs).logits.dtype == (torch.float32 if widened else torch.bfloat16)
    assert (ours - theirs).abs().mean() < HALF_ROUNDING * theirs.abs().mean()


def test_published_weights_are_saved_and_loaded(tiny_config, tmp_path):
    plain = lively(tiny_config)
    plain.save_pretrained(tmp_path / "before")
    optimized = copy.deepcopy(plain).optimize_for_inference()
    with torch.inference_mode():
        optimized(**make_inputs())
    optimized.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert optimized.state_dict().keys() == plain.state_dict().keys()


def test_new_weights_take_effect(tiny_config):
    """Packed weights, joint layers and cached prompts are renewed."""
    optimized = lively(tiny_config).optimize_for_inference()
    inputs = make_inputs()
    torch.manual_seed(5)
    other = lively(tiny_config)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    with torch.inference_mode():
        optimized(**inputs)
    optimized.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert_same(optimized(**inputs), other(**inputs))


def test_copy_gives_the_same_outputs(tiny_config):
    optimized = lively(tiny_config).optimize_for_inference()
    inputs = make_inputs()
    with torch.inference_mode():
        expected = optimized(**inputs)
        assert_same(copy.deepcopy(optimized)(**inputs), expected)


def test_training_is_refused(tiny_config):
    optimized = lively(tiny_config).optimize_for_inference()
    with pytest.raises(ValueError, match="load it again with from_pretrained"):
        optimized.train()
    with pytest.raises(ValueError, match="load it again with from_pretrained"):
        optimized.model.train()
    assert not any(parameter.requires_grad for parameter in optimized.parameters())
    assert not optimized.eval().training


def test_compiles_to_one_graph_with_the_same_outputs(tiny_config):
    torch._dynamo.reset()
    config = copy.deepcopy(tiny_config)
    config.encoder_layers = config.decoder_layers = 1
    plain = lively(config)
    optimized = copy.deepcopy(plain).optimize_for_inference()
    compiled = torch.compile(optimized, fullgraph=True, backend="eager", dynamic=False)
    inputs = make_inputs(height=64, width=96)
    with torch.no_grad():
        assert_same(compiled(**inputs), plain(**inputs))


def test_usual_layers_run_where_packing_is_impossible(tiny_config, monkeypatch, caplog):
    monkeypatch.setattr(optimize_module, "can_pack", lambda dtype: False)
    plain = lively(tiny_config)
    with caplog.at_level("WARNING"):
        optimized = copy.deepcopy(plain).optimize_for_inference()
    assert "not part of this build of torch" in caplog.text
    assert not any(isinstance(module, PackedLinear) for module in optimized.modules())
    inputs = make_inputs(height=64, width=96)
    with torch.inference_mode():
        assert_same(optimized(**inputs), plain(**inputs))


class Mkldnn:
    """torch.ops.mkldnn of a release that has renamed or changed the two private operators."""

    def __init__(self, **operators):
        self.__dict__.update(operators)


def takes_nothing():
    """Stand for an operator whose arguments have changed."""


ABSENT = {
    "renamed": Mkldnn(),
    "other arguments": Mkldnn(_reorder_linear_weight=takes_nothing, _linear_pointwise=takes_nothing),
    "other results": Mkldnn(
        _reorder_linear_weight=lambda weight: weight, _linear_pointwise=lambda x, *rest: x.new_zeros(4, 2)
    ),
}


@pytest.mark.parametrize("case", ABSENT)
def test_changed_private_operators_of_torch_are_one_log_line(tiny_config, monkeypatch, caplog, case):
    monkeypatch.setattr(torch.ops, "mkldnn", ABSENT[case])
    onednn.can_pack.cache_clear()
    try:
        assert not can_pack(torch.float32)
        with caplog.at_level(logging.WARNING):
            optimized = lively(tiny_config).optimize_for_inference()
        assert [record.name for record in caplog.records] == [optimize_module.__name__]
        assert "the usual ones run" in caplog.text
        assert not any(isinstance(module, PackedLinear) for module in optimized.modules())
        with torch.inference_mode():
            assert torch.isfinite(optimized(**make_inputs(height=64, width=96)).pred_boxes).all()
    finally:
        onednn.can_pack.cache_clear()


def attention():
    return MSDeformAttn(16, 2, 2, 2)


def encoder_layer(config):
    return lively(config).model.encoder.layers[0].deformable_layer


@pytest.mark.parametrize(
    ("make", "replace", "replaced"),
    [
        (lambda config: nn.Linear(3, 2), PackedLinear, {"activation", "_packed"}),
        (lambda config: nn.Linear(3, 2, bias=False), Int8Linear, {"activation", "_packed"}),
        (lambda config: attention(), PackedMSDeformAttn, {"_kind", "_joint"}),
        (encoder_layer, PackedDeformableLayer, set()),
    ],
    ids=["PackedLinear", "Int8Linear", "PackedMSDeformAttn", "PackedDeformableLayer"],
)
def test_replacements_carry_over_every_attribute(tiny_config, make, replace, replaced):
    """A field that is added to a layer later reaches its replacement without a change there."""
    layer = make(tiny_config).eval()
    layer.added_later = object()
    layer.register_forward_hook(lambda *_: None)
    children = dict(layer.named_children())
    replacement = replace(layer)
    assert vars(replacement).keys() - vars(layer).keys() == replaced
    assert replacement.added_later is layer.added_later
    assert not replacement.training
    assert len(replacement._forward_hooks) == 1
    ours, theirs = dict(replacement.named_parameters()), dict(layer.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert dict(layer.named_children()) == children, "replacing a sub-module changed the original"


def test_shared_state_does_not_share_its_dictionaries():
    layer, other = nn.Linear(3, 2), nn.Linear(1, 1)
    share_state(other, layer)
    other.weight = nn.Parameter(torch.zeros(2, 3))
    assert layer.weight is not other.weight
    assert layer.bias is other.bias


def test_other_models_are_refused():
    with pytest.raises(TypeError, match=r"takes a GDinoModel or GDinoForObjectDetection, not torch\.nn.*Linear"):
        optimize_module.optimize_for_inference(nn.Linear(2, 2))


def test_prompts_are_cached_and_told_apart(tiny_config):
    optimized = lively(tiny_config).optimize_for_inference()
    calls = []
    optimized.model.text_backbone.register_forward_hook(lambda *_: calls.append(1))
    inputs = make_inputs(batch=1, height=64, width=96)
    other = {**inputs, "input_ids": torch.tensor([[2, 63, 7, 61, 62, 7, 3]])}
    with torch.inference_mode():
        first = optimized(**inputs)
        again = optimized(**inputs)
        different = optimized(**other)
    assert len(calls) == 2
    assert torch.equal(first.logits, again.logits)
    assert not torch.equal(first.logits, different.logits)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_equals_linear(activation, bias):
    torch.manual_seed(0)
    linear = nn.Linear(20, 12, bias=bias).requires_grad_(False)
    packed = PackedLinear(linear, activation)
    x = torch.randn(3, 5, 20)
    expected = {"none": linear(x), "relu": linear(x).relu(), "gelu": nn.functional.gelu(linear(x))}[activation]
    torch.testing.assert_close(packed(x), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed(x.transpose(0, 1)), expected.transpose(0, 1), rtol=0, atol=1e-5)
    assert packed(x[:0]).shape == (0, 5, 12)
    recording = x.requires_grad_()
    assert torch.autograd.grad(packed(recording).sum(), recording)[0].shape == x.shape
