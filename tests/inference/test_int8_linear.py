"""Claims about 8-bit linear layers, compared with the same integers multiplied in float64."""

import copy
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gdino_hf.inference import int8_linear
from gdino_hf.inference.compiled_layers import weights_for
from gdino_hf.inference.int8_linear import Int8Library, Int8Linear, Int8Weight, check_int8
from gdino_hf.inference.packed_swin import window_index
from layer_libraries import assert_defaults_have_no_effect, installed_library, norm

SOURCE = Path(__file__).resolve().parents[2] / "kernels" / "int8_linear" / "int8_linear.c"
# Integers are summed exactly; scale, bias and activation take a few float32 operations.
ROUNDING = 1e-5
ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}


@pytest.fixture(scope="module")
def library():
    return installed_library("_int8_cpu", Int8Library, int8_linear.load, "8-bit layers", "AVX-512 VNNI")


def quantize(x):
    """Quantize rows to integers in [-127, 127], as float64, and return them with their step sizes."""
    step = (x.abs().amax(-1, keepdim=True) / 127).double()
    return torch.where(step > 0, x.double() / step, 0.0).round(), step


def expected(x, weight, bias, activation="none"):
    rows, row_step = quantize(x)
    columns, column_step = quantize(weight)
    product = (rows @ columns.T) * row_step * column_step.T
    return ACTIVATIONS[activation](product + (0.0 if bias is None else bias.double()))


def assert_close(found, wanted, tolerance=ROUNDING):
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * max(1.0, wanted.abs().max().item()))


def make(rows, inputs, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((rows, inputs), (columns, inputs), (columns,))
    )
    # Rows of very different magnitude, since each row has its own scale.
    return x * 10 ** torch.empty(rows, 1).uniform_(-3, 3, generator=generator), weight, bias


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("seed", range(8))
def test_linear_equals_the_product_of_integers(library, activation, seed):
    choose = random.Random(seed)
    rows, inputs, columns = choose.choice((1, 5, 48, 49, 113)), choose.randint(1, 300), choose.randint(1, 300)
    x, weight, bias = make(rows, inputs, columns, seed)
    bias = choose.choice((bias, None))
    found = library.linear(x, Int8Weight(library, weight, bias), activation)
    # Row by row, so that a large row does not hide errors in a small one.
    for row, wanted in zip(found, expected(x, weight, bias, activation), strict=True):
        assert_close(row, wanted)


@pytest.mark.parametrize(("inputs", "columns"), [(96, 288), (256, 384), (2048, 256), (256, 2048), (3, 4)])
def test_error_is_within_the_rounding_of_eight_bits(library, inputs, columns):
    x, weight, bias = make(130, inputs, columns, seed=3)
    found = library.linear(x, Int8Weight(library, weight, bias)).double()
    error = (found - F.linear(x.double(), weight.double(), bias.double())).abs()
    # Each factor is off by at most half a step.
    rows, columns = x.double().abs(), weight.double().abs()
    half_rows, half_columns = (y.amax(-1, keepdim=True) / 254 for y in (rows, columns))
    bound = (
        rows.sum(-1, keepdim=True) * half_columns.T + half_rows * columns.sum(-1) + inputs * half_rows * half_columns.T
    )
    assert (error <= bound * (1 + ROUNDING) + ROUNDING).all()


def test_addend_repeats_over_the_batch(library):
    x, weight, bias = make(3 * 50, 24, 40)
    x, packed = x.view(3, 50, 24), Int8Weight(library, weight, bias)
    addend = torch.randn(1, 50, 24)
    wanted = expected((x + addend).flatten(0, 1), weight, bias).view(3, 50, 40)
    assert_close(library.linear(x, packed, addend=addend), wanted)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(library.linear(strided, packed, addend=addend), library.linear(x, packed, addend=addend))
    # 3 divides 150, so these would silently repeat along the wrong dimension.
    for misfit in (addend[:, :40], x[:, :1]):
        with pytest.raises(ValueError, match="give it x's shape, or 1 as first size"):
            library.linear(x, packed, addend=misfit)
    with pytest.raises(ValueError, match="takes 24 float32 channels"):
        library.linear(x[..., :20], packed)


def test_rows_do_not_depend_on_threads_or_other_rows(library):
    x, weight, bias = make(201, 96, 100)
    packed = Int8Weight(library, weight, bias)
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
def test_non_finite_values_stay_in_their_row(library, value):
    x, weight, bias = make(60, 40, 33)
    packed = Int8Weight(library, weight, bias)
    broken = x.clone()
    broken[7, 11] = value
    found = library.linear(broken, packed, "relu")
    assert found[7].isnan().all()
    others = torch.arange(60) != 7
    assert torch.equal(found[others], library.linear(x, packed, "relu")[others])


def test_zero_and_denormal_rows_give_the_bias(library):
    _, weight, bias = make(1, 40, 33)
    x = torch.zeros(3, 40)
    x[1, 3] = 1e-42
    found = library.linear(x, Int8Weight(library, weight, bias))
    torch.testing.assert_close(found, bias.expand(3, 33), rtol=0, atol=1e-38)
    still = library.linear(torch.ones(2, 40), Int8Weight(library, torch.zeros(33, 40), bias))
    assert torch.equal(still, bias.expand(2, 33))


def test_largest_floats_do_not_overflow(library):
    largest = torch.finfo(torch.float32).max
    x, weight = torch.tensor([[largest, 0.0]]), torch.tensor([[0.5, 1.0]])
    torch.testing.assert_close(
        library.linear(x, Int8Weight(library, weight, None)).item(), largest / 2, rtol=0.01, atol=0
    )
    found = library.linear(weight, Int8Weight(library, x, None))
    torch.testing.assert_close(found.item(), largest / 2, rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype_and_device_have_no_effect(library, dtype):
    assert_defaults_have_no_effect(library, Int8Weight, make(60, 40, 33), dtype)


@pytest.mark.parametrize("post", [True, False], ids=["post norm", "pre norm"])
@pytest.mark.parametrize("branched", [True, False], ids=["branch", "alone"])
@pytest.mark.parametrize(("rows", "width", "hidden"), [(1, 16, 40), (100, 96, 384), (47, 30, 50)])
def test_fused_feed_forward_equals_its_parts(library, post, branched, rows, width, hidden):
    torch.manual_seed(rows)
    x, y = torch.randn(1, rows, width), torch.randn(1, rows, width)
    first, second, project = (
        Int8Linear(nn.Linear(*shape).requires_grad_(False))
        for shape in ((width, hidden), (hidden, width), (width, width))
    )
    first.activation = "relu" if post else "gelu"
    before, after = norm(width), norm(width)
    wide = x + project(y) if branched else x
    normed = before(wide)
    wanted = second(first(normed))
    wanted = after(normed + wanted) if post else wide + wanted
    weights = [layer.weight_for(x) for layer in (first, second, project)]
    found = library.feed_forward(
        x,
        *weights[:2],
        first.activation,
        before=before,
        branch=(y, weights[2]) if branched else None,
        after=after if post else None,
    )
    # float32 sums in another order may round a value to the neighbouring integer, which shifts a product by one step.
    assert (found - wanted).abs().mean() < 1e-4
    assert (found - wanted).abs().max() < 0.05


@pytest.mark.parametrize(
    ("height", "width", "window", "shift"),
    [(14, 21, 7, 0), (15, 20, 7, 3), (9, 5, 4, 2), (13, 12, 12, 6), (3, 3, 7, 0)],
)
@pytest.mark.parametrize("heads", [1, 3])
def test_window_attention_equals_its_parts(library, height, width, window, shift, heads):
    torch.manual_seed(window)
    channels, tokens, area = 32 * heads, height * width, window * window
    x, bias = torch.randn(2, tokens, channels), torch.randn(1, heads, area, area)
    index, regions = window_index(height, width, window, shift)
    qkv, project = (Int8Linear(nn.Linear(channels, n).requires_grad_(False)) for n in (3 * channels, channels))
    qkv.weight.mul_(4)
    before = norm(channels)
    # Padding is an extra token that is zero after the normalization.
    rows = torch.cat((before(x), torch.zeros(2, 1, channels)), dim=1)[:, index]
    query, key, value = qkv(rows).unflatten(-1, (3, heads, 32)).permute(3, 0, 1, 4, 2, 5)
    mask = bias if regions is None else bias - 100.0 * (regions[:, None, None] != regions[:, None, :, None])
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.expand(2, len(index), -1, -1, -1))
    attended = project(attended.transpose(2, 3).flatten(3))
    wanted = torch.zeros(2, tokens + 1, channels)
    wanted[:, index] = attended
    found = library.window_attention(
        x, index, regions, bias, before=before, qkv=qkv.weight_for(x), project=project.weight_for(x)
    )
    wanted = x + wanted[:, :tokens]
    # Occasional rounding to the neighbouring integer, as above; in a small window one such value weighs more.
    assert (found - wanted).abs().mean() < 5e-4
    assert (found - wanted).abs().max() < 0.1
    if regions is not None:
        strided = regions.T.contiguous().T
        again = library.window_attention(
            x, index, strided, bias, before=before, qkv=qkv.weight_for(x), project=project.weight_for(x)
        )
        assert torch.equal(again, found)
    with pytest.raises(ValueError, match="bias has shape"):
        library.window_attention(
            x, index, regions, bias[..., :-1], before=before, qkv=qkv.weight_for(x), project=project.weight_for(x)
        )


@pytest.mark.parametrize("part", ["query", "key", "value", "bias"])
def test_nan_weights_give_nan_outputs(library, part):
    """A NaN weight must not produce a plausible output."""
    torch.manual_seed(0)
    index, _ = window_index(8, 8, 4, 0)
    x, bias = torch.randn(1, 64, 32), torch.randn(1, 1, 16, 16)
    qkv, project = (Int8Linear(nn.Linear(32, n).requires_grad_(False)) for n in (96, 32))
    if part == "bias":
        bias[..., 3] = float("nan")
    else:
        qkv.weight[("query", "key", "value").index(part) * 32 + 5, 7] = float("nan")
    found = library.window_attention(
        x, index, None, bias, before=norm(32), qkv=qkv.weight_for(x), project=project.weight_for(x)
    )
    assert found.isnan().all()


def test_normalization_of_wrong_width_or_dtype_is_refused(library):
    x, weight, bias = make(5, 16, 16)
    weight = Int8Weight(library, weight, bias)
    for other in (norm(8), norm(16).bfloat16()):
        with pytest.raises(ValueError, match="give it 16 float32 weights"):
            library.feed_forward(x, weight, weight, "relu", before=other)
    with pytest.raises(ValueError, match="one shape and dtype"):
        library.feed_forward(x, weight, weight, "relu", before=norm(16), branch=(x.bfloat16(), weight))


def test_layer_falls_back_to_the_ordinary_one(library):
    torch.manual_seed(0)
    linear = nn.Linear(20, 12)
    layer = Int8Linear(linear, "relu")
    x = torch.randn(9, 20)
    wanted = linear(x).relu()
    assert torch.equal(layer(x), wanted)  # autograd records
    x.requires_grad_()
    assert torch.autograd.grad(layer(x).sum(), x)[0].shape == x.shape
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), wanted, rtol=0, atol=1e-6)
        half = Int8Linear(copy.deepcopy(linear).bfloat16(), "relu")
        torch.testing.assert_close(half(x.bfloat16()).float(), wanted, rtol=0.02, atol=0.02)
        assert weights_for(x, layer, half) is None
        ours = layer(x)
        assert not torch.equal(ours, wanted), "the 8-bit path did not run"
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0.05)
        assert torch.equal(layer(x, addend=torch.ones(1, 20)), layer(x + 1))


def test_new_weights_take_effect_and_copies_agree(library):
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(20, 12).requires_grad_(False))
    x = torch.randn(9, 20)
    before = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), before)
    layer.bias.add_(1)
    torch.testing.assert_close(layer(x), before + 1, rtol=0, atol=ROUNDING)
    layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), 2 * (before - layer.bias + 1) + layer.bias, rtol=0, atol=ROUNDING)


def test_check_int8_names_the_obstacle(monkeypatch):
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=r"not torch\.float16 on cpu: leave int8 out"):
        check_int8(cpu, torch.float16)
    with pytest.raises(ValueError, match="on meta"):
        check_int8(torch.device("meta"), torch.float32)
    monkeypatch.setattr(int8_linear, "load", lambda: None)
    monkeypatch.setattr(int8_linear, "find_compiled", lambda name: Path("_int8_cpu.so"))
    with pytest.raises(ValueError, match="needs a CPU with AVX-512 VNNI"):
        check_int8(cpu, torch.float32)
    monkeypatch.setattr(int8_linear, "find_compiled", lambda name: None)
    with pytest.raises(ValueError, match="C compiler"):
        check_int8(cpu, torch.float32)
    monkeypatch.setattr(int8_linear, "find_compiled", lambda name: Path("_int8_cpu.so"))
    monkeypatch.setattr(int8_linear, "can_pack", lambda dtype: False)
    with pytest.raises(ValueError, match="build of torch with oneDNN"):
        check_int8(cpu, torch.float32)


def test_broken_library_is_logged_once(tmp_path, monkeypatch, caplog):
    broken = tmp_path / "_int8_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(int8_linear, "find_compiled", lambda name: broken)
    int8_linear.load.cache_clear()
    try:
        assert int8_linear.load() is None
        assert int8_linear.load() is None
        assert len(caplog.records) == 1
        assert str(broken) in caplog.text
    finally:
        int8_linear.load.cache_clear()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
@pytest.mark.skipif(sys.platform != "linux", reason="the command builds an ELF library")
def test_source_compiles_without_openmp_and_without_warnings(tmp_path, library):
    if not SOURCE.is_file():
        pytest.skip("the C source is not beside these tests")
    output = tmp_path / "int8.so"
    flags = ["-O1", "-std=gnu11", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    subprocess.run(["cc", *flags, str(SOURCE), "-o", str(output)], check=True)
    single = Int8Library(output)
    x, weight, bias = make(70, 33, 65)
    found = single.linear(x, Int8Weight(single, weight, bias), "gelu")
    assert torch.equal(found, library.linear(x, Int8Weight(library, weight, bias), "gelu"))
