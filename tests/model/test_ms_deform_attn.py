"""Claims about deformable attention: the reference equals bilinear sampling by hand, and the operator the reference."""

import logging
import math

import pytest
import torch

from gdino_hf.model import msda_backends
from gdino_hf.model.ms_deform_attn import MSDeformAttn
from gdino_hf.model.msda_c import load
from gdino_hf.model.msda_operator import ms_deform_attn
from gdino_hf.model.msda_reference import ms_deform_attn_reference

SHAPES = [(3, 4), (2, 1)]
FLAT_SHAPES = [side for shape in SHAPES for side in shape]
TOKENS, HEADS, SIZE, POINTS = 14, 2, 3, 2
# float64 against float64, in another order of summation.
TOLERANCE = 1e-12


@pytest.fixture
def reference_backend(monkeypatch):
    monkeypatch.setenv("GDINO_MSDA", "torch")


def make_case(seed=0, queries=4, spread=1.8):
    """Random inputs; with a spread of 1.8, about a third of the locations lie outside [0, 1]."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*size):
        return torch.rand(size, generator=generator, dtype=torch.float64)

    value = rand(2, TOKENS, HEADS, SIZE) - 0.5
    locations = (rand(2, queries, HEADS, len(SHAPES), POINTS, 2) - 0.5) * spread + 0.5
    weights = rand(2, queries, HEADS, len(SHAPES), POINTS)
    return value, locations, weights


def bilinear(level, x, y):
    """Read a map (h, w, Dh) at x, y in [0, 1]: cell (i, j) is centred at ((j + 0.5) / w, (i + 0.5) / h)."""
    height, width = level.shape[:2]
    column, row = x * width - 0.5, y * height - 0.5
    result = torch.zeros(level.shape[2], dtype=torch.float64)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                result += (1 - abs(row - i)) * (1 - abs(column - j)) * level[i, j]
    return result


def looped(value, locations, weights):
    """Compute the operator sample by sample."""
    batch, queries = locations.shape[:2]
    output = torch.zeros(batch, queries, HEADS * SIZE, dtype=torch.float64)
    for b in range(batch):
        for q in range(queries):
            for m in range(HEADS):
                start = 0
                for level, (height, width) in enumerate(SHAPES):
                    image = value[b, start : start + height * width, m].view(height, width, SIZE)
                    start += height * width
                    for k in range(POINTS):
                        x, y = locations[b, q, m, level, k].tolist()
                        sample = bilinear(image, x, y)
                        output[b, q, m * SIZE : (m + 1) * SIZE] += weights[b, q, m, level, k] * sample
    return output


def test_reference_is_bilinear_sampling_with_zeros_outside():
    value, locations, weights = make_case()
    outside = ((locations < 0) | (locations > 1)).any(-1)
    assert 0.2 < outside.double().mean() < 0.9
    found = ms_deform_attn_reference(value, FLAT_SHAPES, locations, weights)
    assert torch.allclose(found, looped(value, locations, weights), rtol=0, atol=TOLERANCE)


def test_samples_with_known_values():
    value = torch.arange(4.0).view(1, 4, 1, 1)
    points = [(0.25, 0.25), (0.75, 0.25), (0.5, 0.5), (0.0, 0.25), (-0.3, 0.5), (1.0, 1.0)]
    locations = torch.tensor(points).view(1, 6, 1, 1, 1, 2)
    found = ms_deform_attn_reference(value, [2, 2], locations, torch.ones(1, 6, 1, 1, 1))
    # Two cells' centres, the middle of all four, an edge (half outside), far outside, a corner (a quarter inside).
    expected = torch.tensor([0.0, 1.0, 1.5, 0.0, 0.0, 0.75])
    torch.testing.assert_close(found.flatten(), expected, rtol=0, atol=1e-6)


def test_locations_stay_float32_with_half_precision_values():
    value, locations, weights = (x.float() for x in make_case(spread=0.8))
    low = value.bfloat16()
    found = ms_deform_attn_reference(low, FLAT_SHAPES, locations, weights)
    assert found.dtype == torch.bfloat16
    expected = ms_deform_attn_reference(low.float(), FLAT_SHAPES, locations, weights)
    assert torch.equal(found, expected.bfloat16())


def test_operator_equals_the_reference_with_every_backend(monkeypatch):
    value, locations, weights = (x.float() for x in make_case())
    expected = ms_deform_attn_reference(value, FLAT_SHAPES, locations, weights)
    for name in ("auto", "c", "torch", "AUTO"):
        monkeypatch.setenv("GDINO_MSDA", name)
        found = ms_deform_attn(value, FLAT_SHAPES, locations, weights)
        # Sums of 4 float32 products of order 1.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("reference_backend")
def test_operator_passes_torch_checks():
    value, locations, weights = (x.requires_grad_() for x in make_case(queries=2))
    torch.library.opcheck(torch.ops.gdino_hf.ms_deform_attn.default, (value, FLAT_SHAPES, locations, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_c_operator_passes_torch_checks(monkeypatch, dtype):
    if load() is None:
        pytest.skip("the C kernels are not built here")
    monkeypatch.setenv("GDINO_MSDA", "c")
    value, locations, weights = (x.float() for x in make_case(queries=2))
    inputs = (value.to(dtype).requires_grad_(), FLAT_SHAPES, locations.requires_grad_(), weights.requires_grad_())
    assert msda_backends.backend_for(inputs[0], inputs[2]) == "c"
    torch.library.opcheck(torch.ops.gdino_hf.ms_deform_attn.default, inputs)


def test_c_operator_compiles_to_one_graph_with_its_gradients(monkeypatch):
    if load() is None:
        pytest.skip("the C kernels are not built here")
    monkeypatch.setenv("GDINO_MSDA", "c")
    torch._dynamo.reset()
    compiled = torch.compile(ms_deform_attn, fullgraph=True, backend="aot_eager")
    results = []
    for function in (ms_deform_attn, compiled):
        value, locations, weights = (x.float().requires_grad_() for x in make_case())
        found = function(value, FLAT_SHAPES, locations, weights)
        results.append((found, *torch.autograd.grad(found.square().sum(), (value, locations, weights))))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("reference_backend")
def test_operator_gradients_pass_gradcheck():
    value, locations, weights = (x.requires_grad_() for x in make_case(queries=2))
    assert torch.autograd.gradcheck(lambda v, p, w: ms_deform_attn(v, FLAT_SHAPES, p, w), (value, locations, weights))


def test_unknown_backend_name_is_refused(monkeypatch):
    monkeypatch.setenv("GDINO_MSDA", "cuda9")
    value, locations, weights = (x.float() for x in make_case())
    with pytest.raises(ValueError, match=r"GDINO_MSDA='cuda9' names no backend; choose one of auto, c, .*torch"):
        ms_deform_attn(value, FLAT_SHAPES, locations, weights)


def test_requested_backend_that_cannot_run_is_logged_once(monkeypatch, caplog):
    monkeypatch.setenv("GDINO_MSDA", "hub")
    msda_backends._log_once.cache_clear()
    # No compiled kernel accepts float64 on a CPU.
    value, locations, weights = make_case()
    with caplog.at_level(logging.WARNING, logger=msda_backends.__name__):
        found = [ms_deform_attn(value, FLAT_SHAPES, locations, weights) for _ in range(3)]
    lines = [record.getMessage() for record in caplog.records if record.name == msda_backends.__name__]
    assert len(lines) == 1
    assert "GDINO_MSDA=hub" in lines[0]
    assert torch.equal(found[0], ms_deform_attn_reference(value, FLAT_SHAPES, locations, weights))


def make_module(width=HEADS * SIZE):
    torch.manual_seed(0)
    module = MSDeformAttn(width, len(SHAPES), HEADS, POINTS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.7 * torch.randn_like(parameter))
    return module


def linear(layer, x):
    return x.double() @ layer.weight.detach().double().T + layer.bias.detach().double()


@pytest.mark.parametrize("numbers", [2, 4])
def test_module_equals_the_equation_with_points_and_boxes(numbers, reference_backend):
    module = make_module()
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(2, 3, HEADS * SIZE, generator=generator)
    values = torch.randn(2, TOKENS, HEADS * SIZE, generator=generator)
    references = torch.rand(2, 3, len(SHAPES), numbers, generator=generator)
    mask = torch.ones(2, TOKENS).bool()
    mask[1, 9:] = False
    found, _ = module(queries, values, references, SHAPES, mask)

    value = linear(module.value_proj, values)
    value[~mask] = 0.0
    offsets = linear(module.sampling_offsets, queries).view(2, 3, HEADS, len(SHAPES), POINTS, 2)
    scores = linear(module.attention_weights, queries).view(2, 3, HEADS, len(SHAPES) * POINTS)
    weights = (scores.exp() / scores.exp().sum(-1, keepdim=True)).view(2, 3, HEADS, len(SHAPES), POINTS)
    locations = torch.zeros_like(offsets)
    for b in range(2):
        for q in range(3):
            for m in range(HEADS):
                for level, (height, width) in enumerate(SHAPES):
                    reference = references[b, q, level].double()
                    for k in range(POINTS):
                        dx, dy = offsets[b, q, m, level, k]
                        if numbers == 2:
                            # Around a point, an offset of 1 is one cell of the level.
                            x, y = reference[0] + dx / width, reference[1] + dy / height
                        else:
                            # Around a box, an offset of K is half a side.
                            x = reference[0] + dx / POINTS * reference[2] / 2
                            y = reference[1] + dy / POINTS * reference[3] / 2
                        locations[b, q, m, level, k, 0], locations[b, q, m, level, k, 1] = x, y
    expected = linear(module.output_proj, looped(value.view(2, TOKENS, HEADS, SIZE), locations, weights))
    # float32 sums of 6 products of order 1, twice.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_masked_values_count_as_zero_and_not_as_the_bias(reference_backend):
    module = make_module()
    references = torch.rand(1, 3, len(SHAPES), 2, generator=torch.Generator().manual_seed(2))
    queries = torch.randn(1, 3, HEADS * SIZE, generator=torch.Generator().manual_seed(3))
    nothing, _ = module(
        queries, torch.randn(1, TOKENS, HEADS * SIZE), references, SHAPES, torch.zeros(1, TOKENS).bool()
    )
    assert torch.equal(nothing, module.output_proj.bias.expand(1, 3, -1))


def test_initial_offsets_give_each_head_a_direction_and_each_point_a_distance():
    module = MSDeformAttn(16, 3, 8, 4)
    found = module.initial_offsets().view(8, 3, 4, 2)
    assert found.numel() == module.sampling_offsets.bias.numel()
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, (x, y) in enumerate(directions):
        for level in range(3):
            for k in range(4):
                expected = [x * (k + 1), y * (k + 1)]
                # float32 sines and cosines, scaled by up to 4.
                assert found[head, level, k].tolist() == pytest.approx(expected, abs=1e-5)
