"""Claims about the recorded forward pass: equal to the eager one, and free of what a CUDA graph cannot hold."""

import contextlib
import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ResNetConfig

from gdino_hf.inference.cuda_graphs import CudaRecorder
from gdino_hf.inference.graphed_stages import GraphedBackbone, _Stages, pad_text, use_graphs
from gdino_hf.inference.prompt_cache import PromptCache
from gdino_hf.model.outputs_gdino import GDinoImageFeatures
from random_models import make_random_model
from rerun_recorder import RerunRecorder

# A longer prompt makes other sums, of exact zeros; BLAS groups the rest differently.
ROUNDING = 1e-4


def make_inputs(seed=1, batch=1, height=64, width=96, tokens=(60, 7, 61, 62, 7)):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[2, *tokens, 3]]).repeat(batch, 1)
    return {
        "pixel_values": torch.randn(batch, 3, height, width, generator=generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def pair_of_models(config, **changes):
    """The same random model twice: as it is, and with recordings."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    plain = make_random_model(config).requires_grad_(False)
    graphed = copy.deepcopy(plain)
    use_graphs(graphed, RerunRecorder())
    graphed.model.text_feature_cache = PromptCache()
    return plain, graphed


def recorder_of(model):
    return model.model.fast_stages.cache.recorder


def assert_same(ours, theirs):
    assert list(ours.keys()) == list(theirs.keys())
    for name in theirs:
        if isinstance(theirs[name], torch.Tensor):
            assert ours[name].dtype == theirs[name].dtype, name
            torch.testing.assert_close(
                ours[name], theirs[name], rtol=0, atol=ROUNDING, msg=lambda m, n=name: f"{n}: {m}"
            )


def variants(seed):
    sizes = {"image_sizes": [(64, 96), (48, 70)]}
    mask = torch.ones(2, 64, 96, dtype=torch.int64)
    mask[1, :, 70:] = 0
    return {
        "one image": make_inputs(seed),
        "two images": make_inputs(seed, batch=2),
        "padding": {**make_inputs(seed, batch=2), **sizes},
        "padding that the model sees": {**make_inputs(seed, batch=2), "pixel_mask": mask},
        "three prompts": {
            **make_inputs(seed, batch=2),
            **{name: make_inputs(seed, batch=3)[name] for name in ("input_ids", "attention_mask")},
            "image_indices": torch.tensor([0, 1, 1]),
        },
        "one prompt for two images": {
            **make_inputs(seed, batch=2),
            **{name: make_inputs(seed)[name] for name in ("input_ids", "attention_mask")},
        },
    }


@pytest.mark.parametrize("variant", variants(0))
def test_replays_equal_the_eager_model(tiny_config, variant):
    plain, graphed = pair_of_models(tiny_config)
    for seed in range(4):
        inputs = variants(seed)[variant]
        with torch.inference_mode():
            assert_same(graphed(**inputs), plain(**inputs))
    # The backbone once per size of image, and the stages.
    assert len(recorder_of(graphed).recorded) == (3 if variant == "padding" else 2)
    assert recorder_of(graphed).replays == 2 * len(recorder_of(graphed).recorded)


@pytest.mark.parametrize(
    "changes",
    [
        {"two_stage": False},
        {"embedding_init_target": False},
        {"decoder_bbox_embed_share": False, "decoder_cls_embed_share": False},
        {"class_head": "scaled_bias"},
        {"fusion_type": "gated"},
        {
            "backbone_config": ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=["stage3", "stage4"]
            )
        },
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_variants_of_the_model_are_recorded(tiny_config, changes):
    plain, graphed = pair_of_models(tiny_config, **changes)
    for seed in range(4):
        with torch.no_grad():
            assert_same(graphed(**make_inputs(seed)), plain(**make_inputs(seed)))
    assert recorder_of(graphed).replays == 4


def test_one_log_line_tells_how_the_model_computes(tiny_config, caplog):
    with caplog.at_level("INFO", logger="gdino_hf"):
        pair_of_models(tiny_config)
    assert [record.levelname for record in caplog.records if "graphed" in record.name] == ["INFO"]
    assert "float32: deformable attention by" in caplog.text
    assert "up to 16 combinations" in caplog.text


def test_the_core_model_alone_is_recorded(tiny_config):
    plain, graphed = pair_of_models(tiny_config)
    for seed in range(4):
        with torch.no_grad():
            ours, theirs = (model.model(**make_inputs(seed)) for model in (graphed, plain))
        assert_same(ours, theirs)
        assert torch.equal(ours.text_features.phrase_ids, theirs.text_features.phrase_ids)
    assert recorder_of(graphed).replays == 4


def test_prompts_of_like_length_share_a_recording(tiny_config):
    plain, graphed = pair_of_models(tiny_config)
    prompts = [(60, 7), (61, 7, 60, 7), (60, 61, 62, 7), (63, 7), (60, 7, 61, 7, 62, 7, 63, 7, 64, 7, 65, 7, 66, 7)]
    for seed, tokens in enumerate(prompts):
        inputs = make_inputs(seed, tokens=tokens)
        with torch.no_grad():
            assert_same(graphed(**inputs), plain(**inputs))
    assert [x["last_hidden_state"][1] for x in recorder_of(graphed).recorded if "last_hidden_state" in x] == [16]


def test_prompts_are_padded_within_the_models_limit(tiny_config):
    plain, graphed = pair_of_models(tiny_config, max_text_len=9)
    for seed in range(4):
        with torch.no_grad():
            assert_same(graphed(**make_inputs(seed)), plain(**make_inputs(seed)))
    assert {x["position_ids"] for x in recorder_of(graphed).recorded if "position_ids" in x} == {(1, 9)}


def test_padded_text_tokens_attend_to_themselves_only(tiny_config):
    plain, _ = pair_of_models(tiny_config)
    features = plain.get_text_features(make_inputs(batch=2)["input_ids"])
    padded = pad_text(features, 256)
    assert {name: tuple(x.shape[:2]) for name, x in padded.items()} == dict.fromkeys(padded, (2, 16))
    assert torch.equal(padded["phrase_mask"][:, 7:, 7:], torch.eye(9, dtype=torch.bool).expand(2, -1, -1))
    assert not padded["phrase_mask"][:, 7:, :7].any()
    assert not padded["attention_mask"][:, 7:].any()


def test_requests_for_more_than_the_usual_outputs_run_eagerly(tiny_config):
    plain, graphed = pair_of_models(tiny_config)
    for seed in range(4):
        inputs = make_inputs(seed)
        with torch.no_grad():
            ours, theirs = (
                model(**inputs, output_attentions=True, output_hidden_states=True) for model in (graphed, plain)
            )
        assert_same(ours, theirs)
        for mine, yours in zip(
            tree_leaves(ours.encoder_attentions), tree_leaves(theirs.encoder_attentions), strict=True
        ):
            torch.testing.assert_close(mine, yours, rtol=0, atol=ROUNDING)
    assert {"pixel_values"} == {name for shapes in recorder_of(graphed).recorded for name in shapes}


def test_other_box_heads_run_eagerly(tiny_config):
    plain, graphed = pair_of_models(tiny_config)

    def deltas(layer, queries):
        return queries[..., :4] * (layer + 1)

    for seed in range(4):
        with torch.no_grad():
            ours, theirs = (model.model(**make_inputs(seed), box_deltas=deltas) for model in (graphed, plain))
        assert_same(ours, theirs)
    assert recorder_of(graphed).replays == 2, "the backbone is replayed"


def test_half_precision_model_keeps_float32_geometry(tiny_config):
    _, graphed = pair_of_models(tiny_config)
    graphed.bfloat16()
    inputs = make_inputs()
    seen = []
    original = graphed.model._stages

    def spy(images, prompts, targets, deltas, attentions, detailed, geometry):
        seen.append({geometry.reference_points.dtype, geometry.valid_ratios.dtype, geometry.proposals.dtype})
        assert {x.dtype for x in images.feature_maps} == {prompts.last_hidden_state.dtype} == {torch.bfloat16}
        return original(images, prompts, targets, deltas, attentions, detailed, geometry)

    graphed.model._stages = spy
    with torch.no_grad():
        output = [graphed(**inputs) for _ in range(4)][-1]
    assert seen == [{torch.float32}] * len(seen)
    assert output.logits.dtype == torch.bfloat16
    for name in ("pred_boxes", "init_reference_points", "intermediate_reference_points", "encoder_pred_boxes"):
        assert output[name].dtype == torch.float32, name


def test_converting_the_model_makes_new_recordings(tiny_config):
    _, graphed = pair_of_models(tiny_config)
    with torch.no_grad():
        for _ in range(4):
            graphed(**make_inputs())
        graphed.double()
        for _ in range(4):
            assert graphed(**make_inputs()).logits.dtype == torch.float64
    assert len(recorder_of(graphed).recorded) == 4


def test_a_copy_has_recordings_of_its_own(tiny_config):
    _, graphed = pair_of_models(tiny_config)
    with torch.no_grad():
        for _ in range(3):
            graphed(**make_inputs())
        other = copy.deepcopy(graphed)
        assert len(graphed.model.fast_stages.cache) == 2
        assert other.model.backbone.fast_forward.cache is other.model.fast_stages.cache
        assert other.model.backbone.fast_forward.backbone is other.model.backbone.conv_encoder.model
        for parameter in other.parameters():
            parameter.mul_(0.9)
        found = [other(**make_inputs()) for _ in range(4)][-1]
        other.model.fast_stages = other.model.backbone.fast_forward = None
        assert_same(found, other(**make_inputs()))


@pytest.mark.slow
def test_compiled_models_contain_no_recordings(tiny_config):
    torch._dynamo.reset()
    plain, graphed = pair_of_models(tiny_config, encoder_layers=1, decoder_layers=1)
    compiled = torch.compile(graphed, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        for _ in range(3):
            assert_same(compiled(**make_inputs()), plain(**make_inputs()))
    assert recorder_of(graphed).recorded == []


class Devices(TorchDispatchMode):
    """Collects the devices of the tensors that each operation reads and writes."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, output)):
            if isinstance(x, torch.Tensor):
                self.seen.setdefault(x.device.type, set()).add(str(function))
        return output


@pytest.mark.parametrize("masked", [False, True], ids=["unpadded", "padded"])
def test_recorded_parts_need_nothing_from_the_host(tiny_config, monkeypatch, masked):
    """A graph cannot hold a copy between host and GPU, nor a decision that depends on values.

    Tensors without values show both: on the meta device, reading a value raises an error, and a tensor made on the
    host is one on another device.
    """
    # torch has no autocast for this device. It is switched off in the box heads, which changes no device.
    monkeypatch.setattr(torch, "autocast", lambda **options: contextlib.nullcontext())
    model = make_random_model(tiny_config).requires_grad_(False).to("meta")
    pixels = torch.empty(2, 3, 64, 96, device="meta")
    text = {
        "last_hidden_state": torch.empty(2, 16, tiny_config.d_model, device="meta"),
        "attention_mask": torch.empty(2, 16, dtype=torch.bool, device="meta"),
        "phrase_mask": torch.empty(2, 16, 16, dtype=torch.bool, device="meta"),
        "position_ids": torch.empty(2, 16, dtype=torch.int64, device="meta"),
    }
    with torch.no_grad():
        maps = model.get_image_features(pixels).feature_maps
        masks = tuple(torch.empty(2, *x.shape[2:], dtype=torch.bool, device="meta") for x in maps) if masked else None
        inputs = {f"map {level}": x for level, x in enumerate(maps)} | text
        inputs |= {f"mask {level}": x for level, x in enumerate(masks or ())}
        compute = _Stages(model.model, GDinoImageFeatures(feature_maps=maps, masks=masks), model._box_deltas)
        with Devices() as devices:
            GraphedBackbone(model.model.backbone.conv_encoder.model, None, None)._compute({"pixel_values": pixels})
            output = compute(inputs)
    assert set(devices.seen) == {"meta"}, devices.seen
    assert any("ms_deform_attn" in name for name in devices.seen["meta"])
    assert output["encoder_pred_boxes"].shape == (2, tiny_config.num_queries, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_recording_fails_with_an_exception():
    """Which is what the cache turns into one line in the log."""
    with pytest.raises((RuntimeError, AssertionError, ValueError)):
        CudaRecorder().record(lambda inputs: inputs, {"x": torch.zeros(1)})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_graphs_equal_the_eager_model(tiny_config, dtype):
    plain = make_random_model(tiny_config).to("cuda", dtype)
    graphed = copy.deepcopy(plain).optimize_for_inference()
    for seed in range(5):
        inputs = {name: x.to("cuda") for name, x in make_inputs(seed, batch=2).items()}
        with torch.inference_mode():
            ours, theirs = graphed(**inputs), plain(**inputs)
        finite = torch.isfinite(theirs.logits)
        tolerance = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}[dtype]
        torch.testing.assert_close(ours.logits[finite], theirs.logits[finite], rtol=0, atol=tolerance)
    assert len(graphed.model.fast_stages.cache) == 2
