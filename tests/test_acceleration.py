"""Claims about use_fast_attention: transformers' own models keep their outputs, and nothing else about them changes."""

import copy
import io

import pytest
import torch
import transformers
from torch import nn

import gdino_hf
from gdino_hf import acceleration
from gdino_hf.acceleration import MultiScaleDeformableAttention, sample_points_per_level
from gdino_hf.model import msda_operator
from gdino_hf.model.msda_operator import ms_deform_attn

# float32 sums of a few hundred products in another order, through a few layers.
TOLERANCE = 1e-5


def resnet():
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def swin(**changes):
    return transformers.SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, image_size=64, **changes
    )


def text(vocabulary=1100):
    return transformers.BertConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )


SMALL = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 10,
}
PIXELS = {"pixel_values": torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))}
PROMPT = torch.tensor([[101, 5, 6, 1012, 7, 1012, 102]]).repeat(2, 1)


def grounding_dino(kind="GroundingDino"):
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=swin(out_features=["stage2", "stage3", "stage4"]), text_config=text(), **SMALL
    )
    model = getattr(transformers, f"{kind}ForObjectDetection")(config)
    return model, {**PIXELS, "input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}


def deformable_detr():
    config = transformers.DeformableDetrConfig(
        backbone_config=resnet(), use_timm_backbone=False, backbone=None, num_feature_levels=4, **SMALL
    )
    return transformers.DeformableDetrForObjectDetection(config), PIXELS


def rt_detr(kind="RTDetr", **changes):
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 24, 32],
        encoder_ffn_dim=32,
        encoder_attention_heads=4,
        d_model=32,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        num_queries=10,
        num_denoising=0,
        **changes,
    )
    return getattr(transformers, f"{kind}ForObjectDetection")(config), PIXELS


def mask2former():
    config = transformers.Mask2FormerConfig(
        backbone_config=swin(out_features=["stage1", "stage2", "stage3", "stage4"]),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        num_attention_heads=4,
        encoder_layers=2,
        decoder_layers=2,
        num_queries=10,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config), PIXELS


def omdet_turbo():
    config = transformers.OmDetTurboConfig(
        backbone_config=swin(out_features=["stage2", "stage3", "stage4"]),
        use_timm_backbone=False,
        backbone=None,
        apply_layernorm_after_vision_backbone=False,
        text_config=transformers.CLIPTextConfig(
            vocab_size=100,
            hidden_size=48,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            projection_dim=48,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
        ),
        text_projection_in_dim=48,
        text_projection_out_dim=48,
        class_embed_dim=48,
        image_size=64,
        vision_features_channels=[32, 32, 32],
        encoder_in_channels=[16, 32, 64],
        encoder_hidden_dim=32,
        encoder_dim_feedforward=32,
        encoder_attention_heads=4,
        decoder_hidden_dim=32,
        decoder_dim_feedforward=32,
        decoder_num_heads=4,
        decoder_num_layers=2,
        task_encoder_hidden_dim=32,
        num_queries=10,
    )
    words = torch.tensor([[5, 6, 7, 2], [8, 9, 2, 1], [10, 2, 1, 1], [11, 12, 13, 2]])
    inputs = {
        "pixel_values": PIXELS["pixel_values"][..., :64],
        "classes_input_ids": words,
        "classes_attention_mask": (words != 1).long(),
        "classes_structure": torch.tensor([2, 2]),
        "tasks_input_ids": words[:2],
        "tasks_attention_mask": (words[:2] != 1).long(),
    }
    return transformers.OmDetTurboForObjectDetection(config), inputs


MODELS = {
    "Grounding DINO": grounding_dino,
    "MM Grounding DINO": lambda: grounding_dino("MMGroundingDino"),
    "Deformable DETR": deformable_detr,
    "RT-DETR": rt_detr,
    "RT-DETRv2": lambda: rt_detr("RTDetrV2"),
    "D-FINE": lambda: rt_detr("DFine", decoder_n_points=[3, 2, 1]),
    "Mask2Former": mask2former,
    "OmDet-Turbo": omdet_turbo,
}


def lively(name):
    """A model whose outputs depend on the samples; those of an untrained one hardly do."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Untrained offsets are whole cells and untrained attention weights are all equal.
            if "sampling_offsets" in key or "attention_weights" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.ndim == 2 and "backbone" not in key:
                parameter.add_(0.5 / parameter.shape[1] ** 0.5 * torch.randn_like(parameter))
        # Untrained norms shrink their input to a hundredth, so that after a few of them there is nothing to sample.
        for norm in norms:
            nn.init.ones_(norm.weight)
            norm.momentum = 1.0
        if norms:
            model.train()(**inputs)
    return model.eval(), inputs


def main_outputs(outputs):
    names = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
    names += ("decoder_class_logits", "decoder_coord_logits")
    found = {name: outputs[name] for name in names if outputs.get(name) is not None}
    assert len(found) == 2
    return found


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_weights_stay_and_the_operator_runs(name, monkeypatch):
    model, inputs = lively(name)
    fast = gdino_hf.use_fast_attention(copy.deepcopy(model))
    calls = []
    backend = msda_operator.backend_for
    monkeypatch.setattr(msda_operator, "backend_for", lambda *args: calls.append(1) or backend(*args))
    with torch.no_grad():
        expected = main_outputs(model(**inputs))
        assert not calls
        found = main_outputs(fast(**inputs))
    assert calls
    monkeypatch.setattr(acceleration, "ms_deform_attn", lambda *args: 0 * ms_deform_attn(*args))
    with torch.no_grad():
        blind = main_outputs(fast(**inputs))
    for key, value in expected.items():
        finite = value.isfinite()
        torch.testing.assert_close(found[key][finite], value[finite], rtol=0, atol=TOLERANCE)
        assert (blind[key][finite] - value[finite]).abs().max() > 100 * TOLERANCE, (
            "the outputs do not depend on the samples"
        )
    assert fast.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["Deformable DETR", "Mask2Former"])
def test_model_trains_and_can_be_copied(name):
    model, inputs = lively(name)
    fast = copy.deepcopy(gdino_hf.use_fast_attention(copy.deepcopy(model)))
    gradients = []
    for one in (model, fast):
        sum(value.square().mean() for value in main_outputs(one(**inputs)).values()).backward()
        gradients.append({key: p.grad for key, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    moved = [key for key in gradients[0] if "sampling_offsets.weight" in key]
    assert moved
    for key in moved:
        scale = gradients[0][key].abs().max()
        assert scale > 0
        torch.testing.assert_close(gradients[1][key], gradients[0][key], rtol=0, atol=float(1e-3 * scale))


def test_model_can_be_pickled():
    model, inputs = lively("RT-DETRv2")
    file = io.BytesIO()
    torch.save(gdino_hf.use_fast_attention(model), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    with torch.no_grad():
        torch.testing.assert_close(main_outputs(loaded(**inputs)), main_outputs(model(**inputs)), rtol=0, atol=0)


def test_layers_of_one_class_compile_separately():
    """A graph that torch.compile made for an original layer must not serve a replaced one."""
    model, _ = lively("RT-DETRv2")
    fast = gdino_hf.use_fast_attention(copy.deepcopy(model))
    shapes = [(4, 6), (2, 3), (1, 2)]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 5, 32, generator=generator),
        "encoder_hidden_states": torch.randn(1, 32, 32, generator=generator),
        "reference_points": torch.rand(1, 5, 1, 4, generator=generator),
        "spatial_shapes": torch.tensor(shapes),
        "spatial_shapes_list": shapes,
    }
    torch._dynamo.reset()
    for one in (model, fast):
        layers = [m for m in one.modules() if type(m).__name__ == "RTDetrV2MultiscaleDeformableAttention"]
        assert len(layers) == 2
        with torch.no_grad():
            for layer in layers:
                compiled = torch.compile(layer, backend="eager")(**inputs)[0]
                torch.testing.assert_close(compiled, layer(**inputs)[0], rtol=0, atol=TOLERANCE)


def test_second_call_changes_nothing_and_other_models_stay():
    model, _ = lively("Mask2Former")
    other = copy.deepcopy(model)
    before = {type(module) for module in other.modules()}
    first = [type(module) for module in gdino_hf.use_fast_attention(model).modules()]
    assert [type(module) for module in gdino_hf.use_fast_attention(model).modules()] == first
    assert {type(module) for module in other.modules()} == before


def test_discrete_sampling_is_refused():
    with pytest.raises(ValueError, match="no multi-scale deformable attention"):
        gdino_hf.use_fast_attention(rt_detr("RTDetrV2", decoder_method="discrete")[0])
    with pytest.raises(ValueError, match="method='discrete'"):
        sample_points_per_level(*[torch.zeros(1)] * 4, [1], "discrete")


def test_model_without_deformable_attention_is_refused():
    with pytest.raises(ValueError, match="Linear has no multi-scale deformable attention"):
        gdino_hf.use_fast_attention(nn.Linear(2, 2))


def test_the_layer_has_no_state():
    """`kernelize` requires a layer without state."""
    layer = MultiScaleDeformableAttention()
    assert not layer.state_dict()
    assert layer.has_backward
    assert layer.can_torch_compile
    assert set(vars(layer)) == set(vars(nn.Module()))


def test_kernelize_accepts_the_layer():
    """The kernels package replaces transformers' layer by this one, and gradients agree."""
    kernels = pytest.importorskip("kernels")
    modeling = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")

    class Repository:
        def load(self):
            return MultiScaleDeformableAttention

    stock_class = type("Stock", (modeling.MultiScaleDeformableAttention,), {})
    kernels.replace_kernel_forward_from_hub(stock_class, "MultiScaleDeformableAttention")
    shapes = [(3, 4), (2, 1)]
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, 14, 2, 8, generator=generator, requires_grad=True)
    locations = torch.rand(1, 5, 2, 2, 4, 2, generator=generator)
    weights = torch.rand(1, 5, 2, 2, 4, generator=generator)
    arguments = value, torch.tensor(shapes), shapes, torch.tensor([0, 12]), locations, weights, 64
    layer = stock_class()
    theirs = layer(*arguments)
    with kernels.use_kernel_mapping({"MultiScaleDeformableAttention": {"cpu": Repository()}}):
        layer = kernels.kernelize(layer, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, device="cpu")
    assert layer.forward.__func__ is MultiScaleDeformableAttention.forward
    ours = layer(*arguments)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    gradients = [torch.autograd.grad(x.square().sum(), value)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
