"""Claims about the float32 layers in C, compared with the same layers of PyTorch in float64.

The code for AVX-512 is compiled a second time for CPUs with AVX2, so that its logic is tested on those as well.
"""

import copy
import ctypes
import math
import mmap
import pickle
import random
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gdino_hf.inference import float_linear
from gdino_hf.inference.compiled_layers import weights_for
from gdino_hf.inference.float_linear import FloatLinear, FloatWeight
from gdino_hf.inference.packed_swin import window_index
from layer_libraries import assert_defaults_have_no_effect, compile_library, compiles, norm

# float32 sums of up to 2048 products of values around 1
ROUNDING = 2e-5
ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}


def make(rows, inputs, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((rows, inputs), (columns, inputs), (columns,))
    )
    return x, weight / inputs**0.5, bias


def assert_close(found, wanted, tolerance=ROUNDING):
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("seed", range(8))
def test_linear_equals_float64(library, activation, seed):
    choose = random.Random(seed)
    rows, inputs, columns = choose.choice((1, 5, 12, 96, 97, 205)), choose.randint(1, 700), choose.randint(1, 300)
    x, weight, bias = make(rows, inputs, columns, seed)
    bias = choose.choice((bias, None))
    found = library.linear(x, FloatWeight(library, weight, bias), activation)
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_close(found, ACTIVATIONS[activation](wanted))


def test_gelu_is_accurate_over_its_whole_range(library):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, -40.0, 40.0, 1e30])])[:, None]
    found = library.linear(x, FloatWeight(library, torch.ones(1, 1), None), "gelu")
    torch.testing.assert_close(found.double(), F.gelu(x.double()), rtol=1e-6, atol=6e-7)


def test_addend_repeats_over_the_batch(library):
    x, weight, bias = make(3 * 50, 24, 40)
    x, packed = x.view(3, 50, 24), FloatWeight(library, weight, bias)
    addend = torch.randn(1, 50, 24, generator=torch.Generator().manual_seed(1))
    assert_close(
        library.linear(x, packed, addend=addend), F.linear((x + addend).double(), weight.double(), bias.double())
    )
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(library.linear(strided, packed, addend=addend), library.linear(x, packed, addend=addend))
    with pytest.raises(ValueError, match="give it x's shape, or 1 as first size"):
        library.linear(x, packed, addend=addend[:, :40])


def test_rows_do_not_depend_on_threads_or_other_rows(library):
    x, weight, bias = make(401, 96, 100)
    packed = FloatWeight(library, weight, bias)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = library.linear(x, packed, "gelu")
        torch.set_num_threads(3)
        assert torch.equal(library.linear(x, packed, "gelu"), one)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(library.linear(x[77:140], packed, "gelu"), one[77:140])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_non_finite_values_stay_in_their_row(library, value, activation):
    x, weight, bias = make(60, 40, 33)
    packed = FloatWeight(library, weight, bias)
    broken = x.clone()
    broken[7, 11] = value
    found = library.linear(broken, packed, activation)
    assert not found[7].isfinite().all()
    sums = F.linear(broken, weight, bias)[7]
    # torch's own GELU of infinity is NaN on processors with AVX-512.
    exact = torch.tensor([each * 0.5 * (1 + math.erf(each / 2**0.5)) for each in sums.tolist()])
    wanted = exact if activation == "gelu" else ACTIVATIONS[activation](sums)
    assert torch.equal(found[7].isnan() | (found[7] == 0), wanted.isnan() | (wanted == 0))
    others = torch.arange(60) != 7
    assert torch.equal(found[others], library.linear(x, packed, activation)[others])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype_and_device_have_no_effect(installed, dtype):
    assert_defaults_have_no_effect(installed, FloatWeight, make(60, 40, 33), dtype)


def packed(library, linear):
    return FloatWeight(library, linear.weight, linear.bias)


@pytest.mark.parametrize("post", [True, False], ids=["post norm", "pre norm"])
@pytest.mark.parametrize("branched", [True, False], ids=["branch", "alone"])
@pytest.mark.parametrize(("rows", "width", "hidden"), [(1, 16, 40), (100, 96, 384), (47, 30, 600), (97, 300, 257)])
def test_fused_feed_forward_equals_its_parts(library, post, branched, rows, width, hidden):
    torch.manual_seed(rows)
    x, y = torch.randn(1, rows, width), torch.randn(1, rows, width)
    shapes = (width, hidden), (hidden, width), (width, width)
    first, second, project = (nn.Linear(*shape).requires_grad_(False) for shape in shapes)
    before, after, activation = norm(width), norm(width), "relu" if post else "gelu"
    weights = [packed(library, linear) for linear in (first, second, project)]
    found = library.feed_forward(
        x,
        *weights[:2],
        activation,
        before=before,
        branch=(y, weights[2]) if branched else None,
        after=after if post else None,
    )
    for module in (first, second, project, before, after):
        module.double()
    wide = x.double() + project(y.double()) if branched else x.double()
    normed = before(wide)
    wanted = second(ACTIVATIONS[activation](first(normed)))
    assert_close(found, after(normed + wanted) if post else wide + wanted)


@pytest.mark.parametrize(
    ("height", "width", "window", "shift"),
    [(14, 21, 7, 0), (15, 20, 7, 3), (9, 5, 4, 2), (13, 12, 12, 6), (3, 3, 7, 0)],
)
@pytest.mark.parametrize("heads", [1, 3, 24])
def test_window_attention_equals_its_parts(library, height, width, window, shift, heads):
    torch.manual_seed(window)
    channels, tokens, area = 32 * heads, height * width, window * window
    x, bias = torch.randn(2, tokens, channels), torch.randn(1, heads, area, area)
    index, regions = window_index(height, width, window, shift)
    qkv, project = (nn.Linear(channels, n).requires_grad_(False) for n in (3 * channels, channels))
    qkv.weight.mul_(4)
    before = norm(channels)
    weights = {"qkv": packed(library, qkv), "project": packed(library, project)}
    found = library.window_attention(x, index, regions, bias, before=before, **weights)
    for module in (qkv, project, before):
        module.double()
    # Padding is an extra token that is zero after the normalization.
    rows = torch.cat((before(x.double()), torch.zeros(2, 1, channels, dtype=torch.float64)), dim=1)[:, index]
    query, key, value = qkv(rows).unflatten(-1, (3, heads, 32)).permute(3, 0, 1, 4, 2, 5)
    mask = bias if regions is None else bias - 100.0 * (regions[:, None, None] != regions[:, None, :, None])
    mask = mask.double().expand(2, len(index), -1, -1, -1)
    attended = project(F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(2, 3).flatten(3))
    wanted = torch.zeros(2, tokens + 1, channels, dtype=torch.float64)
    wanted[:, index] = attended
    # 100 is subtracted from scores of up to 100, which rounds them to 1e-5.
    assert_close(found, x.double() + wanted[:, :tokens], 5e-5)
    with pytest.raises(ValueError, match="bias has shape"):
        library.window_attention(x, index, regions, bias[..., :-1], before=norm(channels), **weights)


@pytest.mark.parametrize("part", ["query", "key", "value", "bias"])
def test_nan_weights_give_nan_outputs(library, part):
    """A NaN weight must not produce a plausible output."""
    torch.manual_seed(0)
    index, _ = window_index(8, 8, 4, 0)
    x, bias = torch.randn(1, 64, 32), torch.randn(1, 1, 16, 16)
    qkv, project = (nn.Linear(32, n).requires_grad_(False) for n in (96, 32))
    if part == "bias":
        bias[..., 3] = float("nan")
    else:
        qkv.weight[("query", "key", "value").index(part) * 32 + 5, 7] = float("nan")
    weights = {"qkv": packed(library, qkv), "project": packed(library, project)}
    assert library.window_attention(x, index, None, bias, before=norm(32), **weights).isnan().all()


def test_layer_falls_back_to_the_ordinary_one(installed):
    torch.manual_seed(0)
    linear = nn.Linear(20, 12)
    layer = FloatLinear(linear, "relu")
    x = torch.randn(9, 20)
    wanted = linear(x).relu()
    assert torch.equal(layer(x), wanted)  # autograd records
    x.requires_grad_()
    assert torch.autograd.grad(layer(x).sum(), x)[0].shape == x.shape
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), wanted, rtol=0, atol=1e-6)
        half = FloatLinear(copy.deepcopy(linear).bfloat16(), "relu")
        torch.testing.assert_close(half(x.bfloat16()).float(), wanted, rtol=0.02, atol=0.02)
        assert weights_for(x, layer, half) is None
        assert weights_for(x, layer)[0].library is installed
        torch.testing.assert_close(layer(x), wanted, rtol=0, atol=1e-6)
        assert torch.equal(layer(x, addend=torch.ones(1, 20)), layer(x + 1))
        output = torch.empty(9, 12)
        layer.writer(x)(output, x, torch.ones(9, 20))
        assert torch.equal(output, layer(x + 1))


def test_new_weights_take_effect_and_copies_agree(installed):
    torch.manual_seed(0)
    layer = FloatLinear(nn.Linear(20, 12).requires_grad_(False))
    x = torch.randn(9, 20)
    before = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), before)
    layer.bias.add_(1)
    torch.testing.assert_close(layer(x), before + 1, rtol=0, atol=ROUNDING)
    layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), 2 * (before - layer.bias + 1) + layer.bias, rtol=0, atol=ROUNDING)


def test_broken_library_is_logged_once(tmp_path, monkeypatch, caplog):
    broken = tmp_path / "_float_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(float_linear, "find_compiled", lambda name: broken)
    float_linear.load.cache_clear()
    try:
        assert float_linear.load() is None
        assert float_linear.load() is None
        assert len(caplog.records) == 1
        assert str(broken) in caplog.text
    finally:
        float_linear.load.cache_clear()


@compiles
def test_source_compiles_without_openmp(tmp_path_factory, installed):
    single = compile_library(tmp_path_factory, "-O1")
    x, weight, bias = make(70, 33, 65)
    found = single.linear(x, FloatWeight(single, weight, bias), "gelu")
    wanted = installed.linear(x, FloatWeight(installed, weight, bias), "gelu")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page of memory")
@pytest.mark.parametrize(("rows", "inputs", "columns"), [(1, 1, 1), (13, 33, 17), (97, 7, 31)])
def test_nothing_is_read_or_written_behind_the_end_of_a_tensor(library, rows, inputs, columns):
    """The last tile of rows and the last panel of columns are where a kernel goes too far."""

    def at_the_end(values):
        """Copy a tensor to the end of a page that a protected page follows."""
        size = -(-values.numel() * 4 // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, size + mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0
        found = torch.frombuffer(memory, dtype=torch.float32, count=size // 4)[size // 4 - values.numel() :]
        return found.view(values.shape).copy_(values)

    x, weight, bias = make(rows, inputs, columns)
    packed_weight = FloatWeight(library, weight, bias)
    out = at_the_end(torch.zeros(rows, columns))
    library.linear(at_the_end(x), packed_weight, addend=at_the_end(x), out=out)
    assert_close(out, F.linear(2 * x.double(), weight.double(), bias.double()))
