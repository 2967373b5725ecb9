"""Claims about convolutions in C, compared with PyTorch's in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gdino_hf.inference.float_convolution import FloatConv2d, FloatConvLeakyReLU, pack_float_convolutions
from gdino_hf.inference.float_linear import FloatWeight, load
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
def test_convolution_equals_float64(shape, slope, threads):
    *sizes, sides = shape
    convolution = make(*sizes, bias=slope is None)
    x = torch.randn(2, sizes[0], *sides, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            layer = FloatConv2d(convolution, slope)
            found = layer(x)
            assert layer._weight is not None, "the library did not run"
            again = layer(x.contiguous(memory_format=torch.channels_last))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found.double(), expected(convolution, x, slope), rtol=0, atol=ROUNDING)
    assert torch.equal(found, again)


def test_parts_of_channels_and_rows():
    """Images may be slices of wider ones, so that layers need no concatenation."""
    convolution = make(6, 10, 3, 1, 1)
    weight = FloatWeight(load(), convolution.weight.permute(0, 2, 3, 1).flatten(1), convolution.bias)
    wide = torch.randn(8, 9, 20, generator=torch.Generator().manual_seed(2))
    out = torch.full((8, 9, 13), 7.0)
    settings = {"side": 3, "step": 1, "padding": 1}
    load().convolution(wide[..., 4:10], weight, out[..., 1:11], rows=slice(2, 5), **settings)
    wanted = expected(convolution, wide[..., 4:10].permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    torch.testing.assert_close(out[2:5, :, 1:11].double(), wanted[2:5], rtol=0, atol=ROUNDING)
    out[2:5, :, 1:11] = 7.0
    assert (out == 7.0).all(), "something else was written"
    with pytest.raises(ValueError, match=r"give it \(8, 9, 10\)"):
        load().convolution(wide[..., 4:10], weight, out, rows=slice(0, 8), **settings)
    with pytest.raises(ValueError, match="channels last"):
        load().convolution(torch.zeros(6, 8, 9).permute(1, 2, 0), weight, out[..., :10], rows=slice(0, 8), **settings)


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
        assert half._weight is None
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
