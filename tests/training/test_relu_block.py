"""Claims about feed-forward blocks in training: results and gradients of the plain layers, whatever is zero."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gdino_hf.inference import float_linear
from gdino_hf.training import relu_block
from gdino_hf.training.relu_block import ReluWeights, functions_of, relu_backward, relu_forward, relu_step
from layer_libraries import WIDE, compile_library, compiles, installed_library

# Sums of float32 products in another order, relative to the largest value of a tensor.
ROUNDING = 5e-6


@pytest.fixture
def installed():
    library = installed_library("_float_cpu", float_linear.FloatLibrary, float_linear.load, "float32 layers", "AVX2")
    if functions_of(library) is None:
        pytest.skip("the float32 layers were built before they had these functions: install the package again")


def make_block(rows, width, hidden, shift=0.0):
    """Return input, parameters and a direction; `shift` moves the hidden values before the ReLU."""
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=generator)

    weights = ReluWeights(
        draw(hidden, width, scale=width**-0.5),
        draw(hidden, scale=0.1) + shift,
        draw(width, hidden, scale=hidden**-0.5),
        draw(width),
    )
    return draw(rows, width), weights, draw(rows, width)


def expected(x, weights, direction):
    """Result, gradients and hidden values in double precision."""
    x, *rest = (y.double().requires_grad_() for y in (x, *weights))
    before = F.linear(x, rest[0], rest[1])
    # Nearer to zero, rounding may decide whether a hidden value is on, which is no error.
    assert before.abs().min() > 1e-6
    out = F.linear(before.relu(), rest[2], rest[3])
    return out, torch.autograd.grad(out, (x, *rest), direction.double()), (before > 0).double().mean().item()


def found(x, weights, direction, needed=(True,) * 4):
    out, kept = relu_forward(x, weights)
    grads = ReluWeights(*(torch.zeros_like(y) if need else None for y, need in zip(weights, needed, strict=True)))
    return out, (relu_backward(direction, x, kept, weights, grads), *grads)


def assert_equal(ours, theirs):
    scale = theirs.abs().max().clamp(min=1e-3)
    assert ((ours - theirs).abs().max() / scale).item() < ROUNDING


def assert_block_equal(block):
    out, gradients, density = expected(*block)
    our_out, ours = found(*block)
    assert_equal(our_out, out)
    for our, gradient in zip(ours, gradients, strict=True):
        assert_equal(our, gradient)
    return density


# Rows are taken 60 at a time, hidden columns 64; columns of the result are cut where registers end.
@pytest.mark.parametrize("rows", [1, 59, 60, 61, 131])
@pytest.mark.parametrize(("width", "hidden"), [(32, 64), (104, 128), (256, 192)])
def test_result_and_gradients_are_those_of_the_plain_layers(installed, rows, width, hidden):
    assert_block_equal(make_block(rows, width, hidden))


@pytest.mark.parametrize(("shift", "dense"), [(-9.0, 0.0), (-1.0, 0.16), (9.0, 1.0)])
def test_any_share_of_hidden_values_may_be_zero(installed, shift, dense):
    density = assert_block_equal(make_block(100, 64, 128, shift))
    assert density == pytest.approx(dense, abs=0.05)


def test_the_sums_of_several_threads_are_added(installed):
    block = make_block(400, 64, 128)
    one = found(*block)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_block_equal(block)
        out, (grad_x, *_) = found(*block)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(out, one[0])
    assert torch.equal(grad_x, one[1][0])


@pytest.mark.parametrize("needed", [(False, True, False, True), (True, False, True, False), (False,) * 4])
def test_frozen_parameters_get_no_gradient_and_the_others_the_same(installed, needed):
    block = make_block(70, 64, 64)
    every, some = found(*block)[1], found(*block, needed)[1]
    assert torch.equal(some[0], every[0])
    for ours, theirs, need in zip(some[1:], every[1:], needed, strict=True):
        assert torch.equal(ours, theirs) if need else ours is None


@pytest.mark.parametrize(("width", "hidden"), [(36, 64), (64, 100)])
def test_other_sizes_run_in_pytorch(width, hidden):
    assert_block_equal(make_block(70, width, hidden))


def test_without_the_library_pytorch_multiplies(monkeypatch):
    monkeypatch.setattr(relu_block, "installed_functions", lambda: None)
    assert functions_of(None) is None
    assert_block_equal(make_block(2100, 64, 64))


def test_a_value_that_is_not_a_number_spreads_as_in_the_plain_layers(installed):
    x, weights, direction = make_block(70, 64, 64)
    x[3, 5] = torch.nan
    out, gradients = found(x, weights, direction)
    assert torch.equal(out.isnan().all(1), x.isnan().any(1))
    assert gradients[1].isnan().any()
    assert gradients[0].isfinite().all()


class Block(nn.Module):
    """What a decoder layer has of such a block."""

    def __init__(self):
        super().__init__()
        self.fc1, self.activation, self.fc2 = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)
        self.activation_dropout = 0.0


CHANGES = {
    "an adapter": lambda block: setattr(block, "fc1", nn.Sequential(block.fc1, nn.Linear(128, 128))),
    "another activation": lambda block: setattr(block, "activation", nn.GELU()),
    "dropout": lambda block: setattr(block, "activation_dropout", 0.1),
    "a hook": lambda block: block.fc2.register_forward_hook(lambda *_: None),
    "double precision": lambda block: block.double(),
    "frozen": lambda block: block.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_the_published_block_is_left_to_its_own_layers(change):
    block, x = Block(), torch.randn(2, 5, 64)
    assert relu_step(block, x) is not None
    CHANGES[change](block)
    assert relu_step(block, x.to(next(block.parameters()).dtype)) is None


def test_an_empty_batch_gives_zero_gradients():
    block = Block()
    relu_step(block, torch.empty(2, 0, 64)).sum().backward()
    assert all(not parameter.grad.any() for parameter in block.parameters())


@compiles
@pytest.mark.parametrize("flags", [WIDE, ("-O1", "-fsanitize=undefined")], ids=["wide", "checked"])
def test_both_widths_of_vectors_compute_the_same(tmp_path_factory, monkeypatch, flags):
    """The wide code is compiled for AVX2 here, so it is tested on every machine."""
    functions = functions_of(compile_library(tmp_path_factory, *flags))
    if functions is None:
        pytest.skip("this CPU has no AVX2")
    monkeypatch.setattr(relu_block, "installed_functions", lambda: functions)
    for sizes in ((131, 256, 192), (70, 112, 64)):
        assert_block_equal(make_block(*sizes))
