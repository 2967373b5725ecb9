"""Claims about the C kernels, compared with a plain transcription of the equation in float64."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gdino_hf.model import compiled_libraries, msda_c

REPOSITORY = Path(__file__).resolve().parents[2]
# Sums of at most 40 float32 products of order 1; location gradients multiply them by a level's size, at most 100.
FORWARD_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
# bfloat16 keeps 8 bits, so rounding once has a relative error of at most 2^-9; sums are float32.
HALF_ROUNDING = 2.0**-8
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


@pytest.fixture(scope="module")
def library():
    found = msda_c.load()
    if found is None:
        reason = "the C kernels are not built: install the package with a C compiler or run kernels/msda/cpu/build.sh"
        if os.environ.get("GDINO_REQUIRE_C") == "1":
            pytest.fail(f"GDINO_REQUIRE_C=1, but {reason}")
        pytest.skip(reason)
    return found


@pytest.fixture(params=INSTRUCTION_SETS)
def any_isa(request, library):
    """The library, limited to each instruction set that this machine has."""
    library.limit_isa(request.param)
    try:
        if library.isa != request.param:
            pytest.skip(f"this machine has no {request.param}")
        yield library
    finally:
        library.limit_isa("avx512")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def reference(value, spatial_shapes, locations, weights):
    """Sample each level with grid_sample, then take the weighted sum over levels and points."""
    batch, _, heads, width = value.shape
    out = value.new_zeros(batch, heads, width, locations.shape[1])
    for level, tokens in enumerate(value.split([h * w for h, w in spatial_shapes], dim=1)):
        h, w = spatial_shapes[level]
        image = tokens.reshape(batch, h, w, heads, width).permute(0, 3, 4, 1, 2).flatten(0, 1)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        sampled = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        sampled = sampled.view(batch, heads, width, *grid.shape[1:3])
        out = out + (sampled * weights[:, :, :, level].transpose(1, 2)[:, :, None]).sum(-1)
    return out.permute(0, 3, 1, 2).flatten(2)


def make_case(seed, *, batch=2, queries=7, heads=3, width=16, levels=2, points=4, spread=1.0, sizes=None):
    """Random inputs whose locations lie within spread / 2 of the image centre: above 1, some lie outside."""
    generator = torch.Generator().manual_seed(seed)
    choose = random.Random(seed)
    shapes = sizes or [(choose.randint(1, 9), choose.randint(1, 11)) for _ in range(levels)]
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, width, generator=generator)
    locations = torch.rand(batch, queries, heads, len(shapes), points, 2, generator=generator)
    locations = off_the_kinks((locations - 0.5) * spread + 0.5, shapes)
    weights = torch.rand(batch, queries, heads, len(shapes), points, generator=generator)
    weights = weights / weights.sum((-2, -1), keepdim=True)
    grad = torch.randn(batch, queries, heads * width, generator=generator)
    return value, shapes, locations, weights, grad


def off_the_kinks(locations, shapes):
    """Move locations away from pixel centres, where the gradient jumps and rounding picks the side."""
    sizes = torch.tensor([[w, h] for h, w in shapes], dtype=torch.float64)[:, None]
    pixels = locations.double() * sizes - 0.5
    on_a_kink = (pixels - pixels.round()).abs() < 1e-4
    return torch.where(on_a_kink, (pixels + 0.01 + 0.5) / sizes, locations.double()).float()


def flat(shapes):
    return [size for pair in shapes for size in pair]


def expected(value, shapes, locations, weights, grad):
    """Compute the output and gradients in float64."""
    inputs = [tensor.double().requires_grad_() for tensor in (value, locations, weights)]
    out = reference(inputs[0], shapes, *inputs[1:])
    return out.detach(), torch.autograd.grad(out, inputs, grad.double())


def assert_matches(library, case):
    value, shapes, locations, weights, grad = case
    out, grads = expected(*case)
    torch.testing.assert_close(
        library.forward(value, flat(shapes), locations, weights).double(), out, rtol=0, atol=FORWARD_TOLERANCE
    )
    for name, ours, theirs in zip(
        ("value", "locations", "weights"),
        library.backward(grad, value, flat(shapes), locations, weights),
        grads,
        strict=True,
    ):
        torch.testing.assert_close(
            ours.double(),
            theirs,
            rtol=GRADIENT_TOLERANCE,
            atol=GRADIENT_TOLERANCE,
            msg=lambda message, name=name: f"gradient of {name}: {message}",
        )


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes_equal_the_reference(any_isa, seed):
    choose = random.Random(1000 + seed)
    case = make_case(
        seed,
        batch=choose.randint(1, 3),
        queries=choose.randint(1, 30),
        heads=choose.randint(1, 5),
        width=choose.choice((8, 9, 16, 20, 24, 31, 32, 40, 48, 64)),
        levels=choose.randint(1, 5),
        points=choose.randint(1, 8),
        spread=choose.choice((0.9, 1.3, 6.0, 200.0)),
    )
    assert_matches(any_isa, case)


@pytest.mark.parametrize("width", [16, 32, 64, 128, 24])
def test_few_and_many_queries_equal_the_reference(any_isa, width):
    """With many queries the library copies each head's values first; with few it reads them in place."""
    for queries in (1, 200):
        assert_matches(any_isa, make_case(3, queries=queries, width=width, sizes=[(9, 13), (5, 7)]))


def test_work_split_by_level_equals_the_reference(library, two_threads):
    """With three heads on two threads, the backward pass is split by level too."""
    assert_matches(library, make_case(4, batch=1, heads=3, sizes=[(9, 13), (5, 7), (3, 4)], points=3, queries=50))


def test_corners_and_borders_equal_the_reference(any_isa):
    """Sample exactly on pixel centres, edges and the image border, where some corner weights are zero."""
    h, w = 4, 6
    xs = torch.tensor([0.0, 0.5, 1.0, 3.0, 5.5, 6.0, 6.5, -0.5, -1.0]) / w
    ys = torch.tensor([0.0, 0.5, 2.0, 3.5, 4.0, 4.5, -0.5]) / h
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="ij"), -1).reshape(1, -1, 1, 1, 1, 2)
    value = torch.randn(1, h * w, 1, 16, generator=torch.Generator().manual_seed(0))
    out = any_isa.forward(value, [h, w], grid, torch.ones(grid.shape[:-1]))
    theirs = reference(value.double(), [(h, w)], grid.double(), torch.ones(grid.shape[:-1]).double())
    torch.testing.assert_close(out.double(), theirs, rtol=0, atol=FORWARD_TOLERANCE)


@pytest.mark.parametrize("width", [16, 24, 64])
@pytest.mark.parametrize("queries", [2, 60])
def test_bfloat16_results_are_rounded_once(any_isa, width, queries):
    value, shapes, locations, weights, grad = make_case(5, width=width, queries=queries, spread=1.3)
    value, grad = value.bfloat16(), grad.bfloat16()
    out, grads = expected(value, shapes, locations, weights, grad)
    ours = any_isa.forward(value, flat(shapes), locations, weights)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), out, rtol=HALF_ROUNDING, atol=FORWARD_TOLERANCE)
    ours_value, ours_locations, ours_weights = any_isa.backward(grad, value, flat(shapes), locations, weights)
    assert (ours_value.dtype, ours_locations.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(ours_value.double(), grads[0], rtol=HALF_ROUNDING, atol=GRADIENT_TOLERANCE)
    torch.testing.assert_close(ours_locations.double(), grads[1], rtol=GRADIENT_TOLERANCE, atol=GRADIENT_TOLERANCE)
    torch.testing.assert_close(ours_weights.double(), grads[2], rtol=GRADIENT_TOLERANCE, atol=GRADIENT_TOLERANCE)


def test_bfloat16_rounding_equals_torch(any_isa):
    """Ties, the largest numbers, denormals, infinities and NaN; a sample on a pixel's centre copies the pixel."""
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00000001, 0x00018000, 0x7F800000, 0x7FC00001, 0x3F800001]
    )
    value = bits.repeat(2).to(torch.int32).view(torch.float32).view(1, 1, 1, 16)
    half = value.bfloat16()
    centre, ones = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)
    out = any_isa.forward(half, [1, 1], centre, ones).flatten()
    torch.testing.assert_close(out, half.flatten(), rtol=0, atol=0, equal_nan=True)
    # The gradient of the value is the output's gradient, as a float32 sum of three thirds that is rounded once.
    finite = torch.where(value.isfinite() & (value.abs() < 1e38), value, torch.ones_like(value)).bfloat16()
    thirds = torch.full((1, 1, 1, 1, 3), 1 / 3)
    ours = any_isa.backward(finite.flatten(2), finite, [1, 1], centre.expand(-1, -1, -1, -1, 3, -1), thirds)[0]
    third = torch.tensor(1 / 3) * finite.float()
    torch.testing.assert_close(ours, (third + third + third).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e38, -3e38])
def test_non_finite_and_huge_locations_contribute_zero(any_isa, bad):
    value, shapes, locations, weights, grad = make_case(6, queries=5)
    elsewhere = locations.clone()
    elsewhere[:, ::2, :, :, 1, 0] = 50.0
    locations[:, ::2, :, :, 1, 0] = bad
    torch.testing.assert_close(
        any_isa.forward(value, flat(shapes), locations, weights),
        any_isa.forward(value, flat(shapes), elsewhere, weights),
        rtol=0,
        atol=0,
    )
    for ours, theirs in zip(
        any_isa.backward(grad, value, flat(shapes), locations, weights),
        any_isa.backward(grad, value, flat(shapes), elsewhere, weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_infinite_values_reach_only_neighbouring_samples(any_isa):
    """A corner outside the level is not read, since zero times infinity would be NaN."""
    value = torch.ones(1, 9, 1, 16)
    value[:, 0] = float("inf")
    value[:, 8] = float("nan")
    places = [[0.4, 0.4], [0.6, 0.4], [0.9, 0.9], [9.0, 9.0], [-0.1, 0.5], [0.5, 1.1], [1.1, 0.4], [-0.1, -0.1]]
    locations = torch.tensor(places).view(1, -1, 1, 1, 1, 2)
    weights = torch.ones(locations.shape[:-1])
    out = any_isa.forward(value, [3, 3], locations, weights)
    theirs = reference(value.double(), [(3, 3)], locations.double(), weights.double())
    assert theirs.isfinite().any()
    assert theirs.isnan().any()
    torch.testing.assert_close(out.double(), theirs, rtol=0, atol=FORWARD_TOLERANCE, equal_nan=True)


def test_results_are_bit_equal_across_runs_and_thread_counts(library):
    before = torch.get_num_threads()
    try:
        for heads in (3, 8):
            value, shapes, locations, weights, grad = make_case(
                7, batch=1, heads=heads, queries=300, sizes=[(16, 20), (8, 10), (4, 5)], spread=1.2
            )
            results = []
            for threads in (2, 2, 1, 3, 7):
                torch.set_num_threads(threads)
                out = library.forward(value, flat(shapes), locations, weights)
                results.append((out, *library.backward(grad, value, flat(shapes), locations, weights)))
            for other in results[1:]:
                for first, second in zip(results[0], other, strict=True):
                    assert torch.equal(first, second)
    finally:
        torch.set_num_threads(before)


def test_a_batch_equals_its_items(any_isa):
    value, shapes, locations, weights, grad = make_case(8, batch=3)
    out = any_isa.forward(value, flat(shapes), locations, weights)
    grads = any_isa.backward(grad, value, flat(shapes), locations, weights)
    for i in range(3):
        item = slice(i, i + 1)
        one = value[item], flat(shapes), locations[item], weights[item]
        assert torch.equal(any_isa.forward(*one), out[item])
        for ours, theirs in zip(any_isa.backward(grad[item], *one), grads, strict=True):
            assert torch.equal(ours, theirs[item])


def test_empty_batches_and_queries_are_accepted(any_isa):
    for batch, queries in ((0, 4), (2, 0)):
        value, shapes, locations, weights, grad = make_case(9, batch=batch, queries=queries)
        out = any_isa.forward(value, flat(shapes), locations, weights)
        assert out.shape == (batch, queries, 48)
        grads = any_isa.backward(grad, value, flat(shapes), locations, weights)
        assert [g.shape for g in grads] == [value.shape, locations.shape, weights.shape]
        assert not grads[0].any()


def test_strided_inputs_and_half_precision_geometry_are_accepted(library):
    value, shapes, locations, weights, grad = make_case(10)
    strided = value.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(
        library.forward(strided, flat(shapes), locations, weights),
        library.forward(value, flat(shapes), locations, weights),
    )
    half = locations.bfloat16(), weights.bfloat16()
    grads = library.backward(grad, value, flat(shapes), *half)
    assert [g.dtype for g in grads] == [torch.float32, torch.bfloat16, torch.bfloat16]
    widened = library.backward(grad, value, flat(shapes), *(tensor.float() for tensor in half))
    assert torch.equal(grads[0], widened[0])


def test_unsupported_inputs_return_none(library):
    value, shapes, locations, weights, _ = make_case(11)
    assert library.forward(value.double(), flat(shapes), locations, weights) is None
    assert library.forward(value.half(), flat(shapes), locations, weights) is None
    assert library.forward(value, flat(shapes), locations.double(), weights) is None
    wide = make_case(11, width=257)
    assert not library.supports(wide[0], wide[2])


def test_mismatched_shapes_are_refused(library):
    value, shapes, locations, weights, grad = make_case(12)
    with pytest.raises(ValueError, match="covers 1 tokens"):
        library.forward(value, [1, 1, 0, 0], locations, weights)
    with pytest.raises(ValueError, match="do not fit"):
        library.forward(value, flat(shapes), locations, weights[..., :1])
    with pytest.raises(ValueError, match="3 heads"):
        library.forward(value, flat(shapes), locations[:, :, :2], weights[:, :, :2])
    with pytest.raises(ValueError, match="grad_output"):
        library.backward(grad[:, :1], value, flat(shapes), locations, weights)


def test_missing_library_is_logged_once_with_what_runs_instead(monkeypatch, caplog):
    monkeypatch.delenv("GDINO_MSDA_LIBRARY", raising=False)
    monkeypatch.setattr(compiled_libraries.importlib.util, "find_spec", lambda name: None)
    msda_c.load.cache_clear()
    try:
        assert msda_c.load() is None
        assert msda_c.load() is None
        assert len(caplog.records) == 1
        assert "PyTorch's own operations (GDINO_MSDA=torch)" in caplog.text
    finally:
        msda_c.load.cache_clear()


def test_broken_library_is_logged_once(tmp_path, monkeypatch, caplog):
    broken = tmp_path / "_msda_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv("GDINO_MSDA_LIBRARY", str(broken))
    msda_c.load.cache_clear()
    try:
        assert msda_c.load() is None
        assert msda_c.load() is None
        assert len(caplog.records) == 1
        assert str(broken) in caplog.text
    finally:
        msda_c.load.cache_clear()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
@pytest.mark.skipif(sys.platform != "linux", reason="the script builds an ELF library")
def test_source_compiles_without_openmp_and_without_warnings(tmp_path):
    source = REPOSITORY / "kernels" / "msda" / "cpu" / "ms_deform_attn.c"
    if not source.is_file():
        pytest.skip("the C source is not beside these tests")
    output = tmp_path / "_msda_cpu.so"
    flags = [
        "-O1",
        "-std=gnu11",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",
        "-Wno-unknown-pragmas",
    ]
    subprocess.run(["cc", *flags, str(source), "-o", str(output)], check=True)
    single = msda_c.CpuLibrary(output)
    assert not single.has_threads
    assert_matches(single, make_case(13))


@pytest.mark.parametrize("axes", [2, 4], ids=["points", "boxes"])
@pytest.mark.parametrize("seed", range(8))
def test_projected_forward_equals_softmax_offsets_and_forward(any_isa, axes, seed):
    choose = random.Random(2000 + seed)
    batch, queries, heads = choose.randint(1, 3), choose.randint(1, 30), choose.randint(1, 5)
    width, levels, points = choose.choice((8, 9, 16, 20, 32, 64)), choose.randint(1, 5), choose.randint(1, 8)
    value, shapes, *_ = make_case(
        seed, batch=batch, queries=queries, heads=heads, width=width, levels=levels, points=points
    )
    generator = torch.Generator().manual_seed(seed)
    samples = heads * levels * points
    projected = 3 * torch.randn(batch, queries, 3 * samples, generator=generator)
    reference_points = torch.rand(choose.choice((1, batch)), queries, levels, axes, generator=generator)
    offsets = projected[..., : 2 * samples].double().view(batch, queries, heads, levels, points, 2)
    weights = projected[..., 2 * samples :].double().view(batch, queries, heads, levels * points).softmax(-1)
    centres = reference_points[:, :, None, :, None, :2].double()
    if axes == 2:
        locations = centres + offsets / torch.tensor([[w, h] for h, w in shapes], dtype=torch.float64)[:, None]
    else:
        locations = centres + offsets / points * reference_points[:, :, None, :, None, 2:].double() / 2
    found = any_isa.forward_projected(value, flat(shapes), projected, reference_points, points)
    theirs = reference(value.double(), shapes, locations, weights.view(locations.shape[:-1]))
    torch.testing.assert_close(found.double(), theirs, rtol=0, atol=FORWARD_TOLERANCE)


def test_projected_forward_accepts_large_logits_and_far_locations(library):
    """The largest logit is subtracted before the exponential, so exp cannot overflow."""
    value = torch.ones(1, 4, 1, 16)
    projected = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 500.0, -500.0]], [[1e30, 0.0, 0.0, 0.0, 300.0, 300.0]]])
    centre = torch.full((1, 1, 1, 2), 0.5)
    found = library.forward_projected(value.expand(2, -1, -1, -1), [2, 2], projected, centre, 2)
    torch.testing.assert_close(found[0], torch.ones(1, 16))
    torch.testing.assert_close(found[1], torch.full((1, 16), 0.5))


def test_mismatched_projected_shapes_are_refused(library):
    value = torch.ones(1, 4, 1, 16)
    with pytest.raises(ValueError, match="do not fit"):
        library.forward_projected(value, [2, 2], torch.zeros(1, 1, 7), torch.zeros(1, 1, 1, 2), 2)
    with pytest.raises(ValueError, match="do not fit"):
        library.forward_projected(value, [2, 3], torch.zeros(1, 1, 6), torch.zeros(1, 1, 1, 2), 2)
