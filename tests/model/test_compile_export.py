"""Claims about graphs: torch.compile has no graph break, and torch.export keeps sizes dynamic."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch.export import Dim
from transformers import ResNetConfig, SwinConfig

from gdino_hf.model.csp_pan import CspPanConfig
from random_models import make_random_model

# Fused kernels sum in a different order from eager ones.
ROUNDING = 1e-4


@pytest.fixture
def short_config(tiny_config):
    """Config of a model with a single layer of each kind, which compiles in half the time."""
    config = copy.deepcopy(tiny_config)
    config.encoder_layers = config.decoder_layers = 1
    return config


@pytest.fixture
def model(short_config):
    return make_random_model(short_config)


def make_inputs(tokenizer, batch=2, height=64, width=96, prompts=("cat. dog.", "person. remote control.")):
    generator = torch.Generator().manual_seed(0)
    text = tokenizer(list(prompts)[:batch], padding=True, return_tensors="pt")
    mask = torch.ones(batch, height, width, dtype=torch.int64)
    mask[-1, :, width // 2 :] = 0
    return {
        "pixel_values": torch.randn(batch, 3, height, width, generator=generator),
        "pixel_mask": mask,
        "input_ids": text["input_ids"],
        "attention_mask": text["attention_mask"],
    }


def assert_same(ours, theirs):
    finite = torch.isfinite(theirs.logits)
    assert torch.equal(torch.isfinite(ours.logits), finite)
    torch.testing.assert_close(ours.logits[finite], theirs.logits[finite], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(ours.pred_boxes, theirs.pred_boxes, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("training", "backend"), [(False, "aot_eager"), (True, "eager")], ids=["eval", "train"])
def test_compiles_to_one_graph_without_labels(tiny_config, short_config, tiny_tokenizer, training, backend):
    torch._dynamo.reset()
    # Several layers of each kind once, with the backend that costs least.
    model = make_random_model(copy.deepcopy(tiny_config) if training else short_config).train(training)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    inputs = make_inputs(tiny_tokenizer)
    with torch.set_grad_enabled(training):
        torch.manual_seed(0)
        result = compiled(**inputs)
        torch.manual_seed(0)
        assert_same(result, model(**inputs))


@pytest.mark.parametrize("make", [list, torch.tensor], ids=["list", "tensor"])
def test_compiles_to_one_graph_with_image_sizes(model, tiny_tokenizer, make):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    inputs = make_inputs(tiny_tokenizer)
    inputs.pop("pixel_mask")
    inputs["image_sizes"] = make([(64, 96), (64, 48)])
    with torch.no_grad():
        assert_same(compiled(**inputs), model(**inputs))


# The whole model, above, holds the core.
@pytest.mark.parametrize("core", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_the_core_model_and_image_features_compile_to_one_graph_with_a_tensor_of_image_sizes(
    model, tiny_tokenizer, core
):
    torch._dynamo.reset()
    owner = model.model if core else model
    inputs = make_inputs(tiny_tokenizer)
    inputs.pop("pixel_mask")
    sizes = torch.tensor([(64, 96), (64, 48)])
    options = {"fullgraph": True, "backend": "eager", "dynamic": False}
    with torch.no_grad():
        found = torch.compile(owner.get_image_features, **options)(inputs["pixel_values"], image_sizes=sizes)
        wanted = owner.get_image_features(inputs["pixel_values"], image_sizes=sizes)
        for ours, theirs in zip(found.feature_maps, wanted.feature_maps, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)
        if core:
            found = torch.compile(owner, **options)(**inputs, image_sizes=sizes)
            wanted = owner(**inputs, image_sizes=sizes)
            torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state, rtol=0, atol=ROUNDING)


# Images with no, one and several boxes in many combinations, each of which would have a graph of its own.
COUNTS = [(1, 1), (3, 0), (2, 5), (0, 0), (7, 1), (1, 12), (0, 2), (1, 0), (4, 4)]


@pytest.fixture
def eager_random_numbers():
    """Let Inductor draw the numbers of dropout as eager does, instead of from a generator of its own."""
    import torch._inductor.config

    # Pytest's monkeypatch would delete the setting at the end.
    with torch._inductor.config.patch(fallback_random=True):
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(x, marks=pytest.mark.soak) for x in ("aot_eager", "inductor"))]
)
def test_training_with_changing_numbers_of_boxes_compiles_only_in_the_first_steps_and_breaks_only_at_labels(
    short_config, tiny_tokenizer, eager_random_numbers, backend
):
    torch._dynamo.reset()
    reasons = []

    def compiler(graph, examples):
        if graph.compile_subgraph_reason.graph_break:
            reasons.append(graph.compile_subgraph_reason.reason)
        return lookup_backend(backend)(graph, examples)

    model = make_random_model(short_config).train()
    compiled = torch.compile(model, backend=compiler)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    inputs, generator = make_inputs(tiny_tokenizer, height=32, width=32), torch.Generator().manual_seed(0)
    graphs = []
    for step, numbers in enumerate(COUNTS):
        boxes = [torch.rand(n, 4, generator=generator) * 0.3 + 0.3 for n in numbers]
        labels = [{"class_labels": torch.zeros(len(x), dtype=torch.int64), "boxes": x} for x in boxes]
        losses = []
        for each in (model, compiled):
            torch.manual_seed(step)
            losses.append(each(**inputs, labels=labels).loss)
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)
        losses[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # A first batch, batches of other sizes, and a batch without boxes.
    assert graphs[3] > graphs[1] > graphs[0] > 0
    assert graphs[1] == graphs[2]
    assert len(set(graphs[3:])) == 1
    assert reasons
    known = ("_targets", "_denoising_queries", "_loss")
    assert all(any(name in reason for name in known) for reason in reasons), reasons


@pytest.mark.soak  # a minute of compiling; aot_eager compiles the same graph above
def test_inductor_gives_the_same_outputs(short_config, tiny_tokenizer):
    torch._dynamo.reset()
    model = make_random_model(short_config)
    compiled = torch.compile(model, fullgraph=True)
    inputs = make_inputs(tiny_tokenizer)
    with torch.no_grad():
        assert_same(compiled(**inputs), model(**inputs))


class Exportable(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, pixel_mask, input_ids, attention_mask):
        outputs = self.model(
            pixel_values=pixel_values, pixel_mask=pixel_mask, input_ids=input_ids, attention_mask=attention_mask
        )
        return outputs.logits, outputs.pred_boxes


def swin(window_size):
    """A Swin with shifted and unshifted windows in every stage."""
    return SwinConfig(
        embed_dim=8,
        depths=[2, 2, 2, 2],
        num_heads=[1, 1, 2, 2],
        window_size=window_size,
        out_features=["stage2", "stage3", "stage4"],
    )


BACKBONES = {
    "swin, window 4": lambda: swin(4),
    # The example's coarsest map (5 x 7 cells) is one window; this count must not become a constant of the graph.
    "swin, window 7": lambda: swin(7),
    "resnet": lambda: ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    ),
    "csp_pan": lambda: CspPanConfig(stem_width=4, stage_widths=[4, 4, 8, 8], stage_depths=[1, 1, 1, 1], pan_width=8),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone",
    # The hardest in every run; test_exporting.py has gdino-nano.
    [pytest.param(x, marks=() if x == "swin, window 7" else pytest.mark.soak) for x in BACKBONES],
)
def test_exports_with_dynamic_batch_image_size_and_text_length(tiny_config, short_config, tiny_tokenizer, backbone):
    # Several layers of each kind once; the backbones differ in nothing behind them.
    config = copy.deepcopy(tiny_config) if backbone == "resnet" else short_config
    config.backbone_config = BACKBONES[backbone]()
    if backbone == "swin, window 7":
        # Sums of the areas of several levels make the tracer's formulas long: every further level doubles the time.
        config.backbone_config.out_features = ["stage3", "stage4"]
        config.num_feature_levels = 2
    model = make_random_model(config)
    shapes = {
        "pixel_values": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},
        "pixel_mask": {0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO},
        "input_ids": {0: Dim.AUTO, 1: Dim.AUTO},
        "attention_mask": {0: Dim.AUTO, 1: Dim.AUTO},
    }
    # Large enough that no map has a side of one cell, since the exporter treats sizes of one as constants.
    inputs = make_inputs(tiny_tokenizer, 2, 160, 224)
    three = ("cat. dog. hat.", "a big red dog. person. cup.", "tree.")
    with torch.no_grad():
        exported = torch.export.export(Exportable(model), (), inputs, dynamic_shapes=shapes, strict=False).module()
        for other in (
            inputs,
            make_inputs(tiny_tokenizer, 1, 223, 151),
            make_inputs(tiny_tokenizer, 3, 333, 500, three),
            make_inputs(tiny_tokenizer, 2, 128, 130, ("remote control. tree.", "dog.")),
            make_inputs(tiny_tokenizer, 1, 480, 320, ("a big red dog.",)),
        ):
            logits, boxes = exported(**other)
            expected = model(**other)
            finite = torch.isfinite(expected.logits)
            assert torch.equal(torch.isfinite(logits), finite)
            torch.testing.assert_close(logits[finite], expected.logits[finite], rtol=0, atol=ROUNDING)
            torch.testing.assert_close(boxes, expected.pred_boxes, rtol=0, atol=ROUNDING)
