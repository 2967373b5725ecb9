"""Claims about convolutions in C, compared with PyTorch's in float64."""

import copy
import ctypes
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gdino_hf.inference.float_convolution import (
    FloatConv2d,
    FloatConvLeakyReLU,
    function_of,
    pack_float_convolutions,
)
from gdino_hf.inference.float_linear import load
from gdino_hf.inference.packed_convolution import PackedConv2d
from gdino_hf.model.csp_pan import CspPanBackbone, CspPanConfig

pytestmark = pytest.mark.skipif(load() is None, reason="the float32 layers cannot run here")
# float32 sums of up to 2304 products of values around 1
ROUNDING = 3e-5
SHAPES = [
    # channels, columns, side, step, padding, (height, width)
    (3, 32, 3, 2, 1, (33, 50)),
    (5, 7, 3, 1, 1, (9, 4)),
    (64, 16, 1, 1, 0, (13, 11)),
    (130, 40, 3, 2, 1, (12, 15)),
    (256, 9, 3, 1, 1, (10, 3)),
    (4, 6, 7, 2, 3, (30, 31)),
    (8, 8, 2, 2, 0, (7, 9)),
    (500, 3, 3, 1, 0, (3, 3)),
    (32, 16, 3, 1, 1, (40, 37)),
    (20, 33, 3, 1, 2, (11, 1)),
    (16, 200, 3, 1, 1, (6, 7)),
    (16, 200, 3, 2, 1, (6, 7)),
    (1, 1, 3, 1, 1, (1, 1)),
]


def make(channels, columns, side, step, padding, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = nn.Conv2d(channels, columns, side, step, padding, bias=bias).requires_grad_(False)
    for parameter in made.parameters():
        parameter.normal_(std=1 / (channels * side * side) ** 0.5, generator=generator)
    return made


def expected(convolution, x, slope=None):
    y = copy.deepcopy(convolution).double()(x.double())
    return y if slope is None else F.leaky_relu(y, slope)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slope", [None, 0.1])
@pytest.mark.parametrize("threads", [1, 3])
def test_convolution_equals_float64(shape, slope, threads, library):
    *sizes, sides = shape
    convolution = make(*sizes, bias=slope is None)
    x = torch.randn(2, sizes[0], *sides, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            layer = FloatConv2d(convolution, slope, library)
            found = layer(x)
            assert layer._ready is not None, "the library did not run"
            again = layer(x.contiguous(memory_format=torch.channels_last))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found.double(), expected(convolution, x, slope), rtol=0, atol=ROUNDING)
    assert torch.equal(found, again)


@pytest.mark.parametrize("step", [1, 2])
def test_images_may_be_parts_of_the_channels_of_others(step):
    layer = FloatConv2d(make(6, 10, 3, step, 1))
    wide = torch.randn(2, 8, 9, 20, generator=torch.Generator().manual_seed(2))
    rows, columns = 8 // step, -(-9 // step)
    out = torch.full((2, rows, columns, 13), 7.0)
    with torch.inference_mode():
        _, described = layer._describe(load(), wide[..., 4:10])
        described.source.stride, described.target.stride = 20, 13
        places = wide[..., 4:].data_ptr(), out[..., 1:].data_ptr()
        status = function_of(load())(described, *places, ctypes.byref(ctypes.c_int64(0)))
    assert status == 0
    wanted = expected(layer, wide[..., 4:10].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(out[..., 1:11].double(), wanted, rtol=0, atol=ROUNDING)
    out[..., 1:11] = 7.0
    assert (out == 7.0).all(), "something else was written"


@pytest.mark.parametrize("step", [1, 2])
def test_threads_that_share_a_counter_compute_each_block_once(step):
    layer = FloatConv2d(make(16, 24, 3, step, 1))
    x = torch.randn(3, 30, 31, 16, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        whole = layer(x.permute(0, 3, 1, 2))
        _, described = layer._describe(load(), x)
        described.rows = 2
        described.columns = load().padded_columns(1)
        blocks = 3 * -(-described.target.height // 2) * -(-24 // described.columns)
        found, taken = torch.full(whole.permute(0, 2, 3, 1).shape, torch.nan), ctypes.c_int64(0)

        def take():
            assert function_of(load())(described, x.data_ptr(), found.data_ptr(), ctypes.byref(taken)) == 0

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert taken.value == blocks + 4
    assert torch.equal(found.permute(0, 3, 1, 2), whole)


def test_a_library_from_an_older_source_leaves_convolutions_to_onednn(caplog):
    class Older:
        def function(self, name, result, arguments):
            raise AttributeError(name)

    convolution = make(3, 4, 3, 1, 1)
    layer = FloatConv2d(convolution, 0.1, Older())
    x = torch.randn(1, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(layer(x).double(), expected(convolution, x, 0.1), rtol=0, atol=ROUNDING)
    assert "older source" in caplog.text


def test_what_the_library_does_not_compute_runs_as_before():
    others = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, (3, 1)),
        nn.Conv2d(4, 4, 3, stride=(1, 2), padding=1),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding="same"),
    ).requires_grad_(False)
    pack_float_convolutions(others)
    assert {type(layer) for layer in others} == {nn.Conv2d}
    layer = FloatConv2d(make(3, 4, 3, 1, 1), 0.1)
    x = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    y = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    wanted = expected(layer, x)
    assert torch.autograd.grad(layer(y).sum(), y)[0].shape == x.shape
    with torch.inference_mode():
        half = FloatConv2d(make(3, 4, 3, 1, 1).bfloat16(), 0.1)
        torch.testing.assert_close(half(x.bfloat16()).double(), wanted, rtol=0, atol=0.05)
        assert half._ready is None
        with pytest.raises(RuntimeError, match="channels"):
            layer(x[:, :2])


@pytest.mark.parametrize("size", [(64, 96), (33, 70), (31, 1)])
def test_a_whole_backbone_equals_the_plain_one(size):
    torch.manual_seed(0)
    config = CspPanConfig(stem_width=6, stage_widths=[6, 8, 10, 12], pan_width=8, head_features=True)
    plain = CspPanBackbone(config).eval().requires_grad_(False)
    packed = copy.deepcopy(plain)
    pack_float_convolutions(packed)
    kinds = {type(module) for module in packed.modules()}
    assert {FloatConv2d, FloatConvLeakyReLU} <= kinds
    assert nn.Conv2d not in kinds
    assert PackedConv2d not in kinds
    assert [*packed.state_dict()] == [*plain.state_dict()]
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        maps = zip(packed(x).feature_maps, plain.double()(x.double()).feature_maps, strict=True)
        for found, wanted in maps:
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=ROUNDING * wanted.abs().max().item())
        plain.float()


def test_new_weights_take_effect_and_copies_agree():
    layer = FloatConv2d(make(3, 4, 3, 1, 1))
    x = torch.randn(1, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        first = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), first)
    layer.weight.mul_(2)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=0, atol=ROUNDING)
