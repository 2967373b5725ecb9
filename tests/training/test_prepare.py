"""Claims about prepare_for_training: equal losses and gradients, through its own steps where they apply."""

import collections
import copy

import pytest
import torch

from gdino_hf.training.encoder_step import BLOCK, layer_step
from gdino_hf.training.prepare import prepare_for_training
from random_models import make_random_model

# Sums of float32 products in another order, relative to the largest gradient of a parameter.
ROUNDING = 1e-4
DEPTHS = [2, 2, 1, 1]
HEIGHT, WIDTH = 100, 150  # no stage of the backbone is a multiple of its windows


@pytest.fixture
def plain(tiny_config):
    """A random model with dropout and drop path in which every weight matters."""
    config = copy.deepcopy(tiny_config)
    config.dropout, config.num_denoising_queries = 0.1, 6
    config.backbone_config.drop_path_rate, config.backbone_config.depths = 0.3, DEPTHS
    model = make_random_model(config, perturb=lambda name: "backbone" not in name or "bias_table" in name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


@pytest.fixture
def prepared(plain):
    return prepare_for_training(copy.deepcopy(plain))


def make_batch(**extra):
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[2, 60, 5, 61, 62, 5, 3]]).repeat(2, 1)
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.4, 0.3]])
    return {
        "pixel_values": torch.randn(2, 3, HEIGHT, WIDTH, generator=generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": [{"class_labels": torch.tensor([0, 1]), "boxes": boxes}] * 2,
        **extra,
    }


def train(model, seed=0, **extra):
    """Return the loss of one batch and the gradients by name."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**make_batch(**extra)).loss
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        if gradient is None:
            assert ours[1][name] is None, name
            continue
        # A softmax cancels the bias of the keys, so its gradient is pure rounding.
        cancelled = name.endswith(("key.bias", "k_proj.bias"))
        scale = theirs[1][name.replace("bias", "weight") if cancelled else name].abs().max()
        error = (ours[1][name] - gradient).abs().max() / scale.clamp(min=1e-6)
        assert error < ROUNDING, (name, float(error))


def mask_columns():
    mask = torch.ones(2, HEIGHT, WIDTH, dtype=torch.int64)
    mask[1, :, 90:] = 0
    return mask


EXTRA = {
    "unpadded": {},
    "padded": {"pixel_mask": mask_columns()},
    "sizes": {"image_sizes": [(HEIGHT, WIDTH), (64, 90)]},
}


def count_steps(model, **extra):
    """Count the hand-written steps of encoder, backbone and decoder in the graph of a batch's loss."""
    nodes, seen = [model(**make_batch(**extra)).loss.grad_fn], set()
    names = collections.Counter()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names[node.name()] += 1
        nodes += [parent for parent, _ in node.next_functions]
    return tuple(names[f"{name}StepBackward"] for name in ("_Layer", "_Block", "_Relu"))


@pytest.mark.parametrize("extra", EXTRA)
def test_loss_and_every_gradient_stay_the_same(plain, prepared, extra):
    assert_equal(train(prepared, **EXTRA[extra]), train(plain, **EXTRA[extra]))
    # The backbone runs once per size of the images.
    expected = (2, sum(DEPTHS) * (2 if extra == "sizes" else 1), 2)
    assert count_steps(prepared, **EXTRA[extra]) == expected
    assert count_steps(plain, **EXTRA[extra]) == (0, 0, 0)


def test_frozen_parts_get_no_gradient_and_the_others_the_same(plain, prepared):
    frozen = (
        "decoder.layers.0.fc2",
        "deformable_layer.fc1",
        "sampling_offsets.weight",
        "blocks.0.attention.q_proj",
        "blocks.0.mlp",
        "norm",
    )
    for model in (plain, prepared):
        for name, parameter in model.named_parameters():
            if any(part in name for part in frozen):
                parameter.requires_grad_(False)
    assert_equal(train(prepared), train(plain))
    assert count_steps(prepared) == (2, sum(DEPTHS), 2)


def test_a_frozen_backbone_runs_without_steps(plain, prepared):
    for model in (plain, prepared):
        model.model.backbone.requires_grad_(False)
    assert_equal(train(prepared), train(plain))
    assert count_steps(prepared) == (2, 0, 2)


def test_gradient_checkpointing_gives_the_same(plain, prepared):
    prepared.gradient_checkpointing_enable()
    assert_equal(train(prepared), train(plain))


def test_hooks_and_adapters_are_run(prepared):
    """A step that skipped them would train something else than the model."""
    seen = []
    layer = prepared.model.encoder.layers[0].deformable_layer
    layer.fc1.register_forward_hook(lambda *_: seen.append("encoder"))
    block = prepared.model.backbone.conv_encoder.model.swin.encoder.layers[0].blocks[0]
    block.mlp.fc1.register_forward_hook(lambda *_: seen.append("backbone"))
    decoder = prepared.model.decoder.layers[1]
    decoder.fc2.register_forward_hook(lambda *_: seen.append("decoder"))
    train(prepared)
    assert sorted(seen) == ["backbone", "decoder", "encoder"]
    assert count_steps(prepared) == (1, 0, 1)


def test_double_precision_and_autocast_run_the_plain_layers(plain, prepared):
    with torch.autocast("cpu", torch.bfloat16):
        assert count_steps(prepared) == (0, 0, 0)
    batch = make_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    torch.manual_seed(0)
    loss = prepared.double()(**batch).loss
    torch.manual_seed(0)
    assert loss.item() == plain.double()(**batch).loss.item()


def test_evaluation_is_bit_equal(plain, prepared):
    batch = make_batch()
    del batch["labels"]
    with torch.no_grad():
        ours, theirs = prepared.eval()(**batch), plain.eval()(**batch)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.pred_boxes, theirs.pred_boxes)


def test_a_prepared_model_can_be_copied_and_optimized(plain, prepared):
    copied = copy.deepcopy(prepared)
    assert copied.model.backbone.fast_forward.backbone is copied.model.backbone.conv_encoder.model
    assert_equal(train(copied), train(plain))
    batch = make_batch()
    del batch["labels"]
    with torch.no_grad():
        expected = plain.eval()(**batch)
        found = prepared.optimize_for_inference()(**batch)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, rtol=0, atol=1e-4)


def test_maps_of_several_blocks_of_tokens_give_the_same_gradients(plain):
    """One layer on its own, with more tokens than fit into two blocks."""
    layer = plain.model.encoder.layers[0].deformable_layer
    generator = torch.Generator().manual_seed(0)
    shapes = [(50, 60), (7, 9), (3, 4), (2, 2)]
    tokens = sum(h * w for h, w in shapes)
    assert tokens > 2 * BLOCK
    width = plain.config.d_model
    features = torch.randn(2, tokens, width, generator=generator)
    references = torch.rand(1, tokens, 4, 2, generator=generator)
    mask = torch.rand(2, tokens, generator=generator) > 0.2
    places = torch.randn(1, tokens, width, generator=generator)
    direction = torch.randn(2, tokens, width, generator=generator)
    results = []
    for fast in (None, layer_step):
        layer.fast_step = fast
        layer.zero_grad()
        inputs = [features.clone().requires_grad_(), places.clone().requires_grad_()]
        torch.manual_seed(3)
        output, _ = layer(*inputs, references, shapes, mask)
        (output * direction).sum().backward()
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        results.append((output.sum().item(), {**gradients, "vision": inputs[0].grad, "places": inputs[1].grad}))
    assert_equal(results[1], results[0])


def test_other_models_are_refused():
    with pytest.raises(TypeError, match=r"not torch\.nn\.modules\.linear\.Linear"):
        prepare_for_training(torch.nn.Linear(2, 2))


def test_a_gradient_of_a_gradient_is_refused_rather_than_wrong(prepared):
    parameter = prepared.model.backbone.conv_encoder.model.swin.encoder.layers[0].blocks[0].mlp.fc1.weight
    (gradient,) = torch.autograd.grad(prepared(**make_batch()).loss, parameter, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
