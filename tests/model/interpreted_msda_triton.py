"""Claims about the Triton kernels in Triton's interpreter, compared with the equation in float64.

`test_msda_triton.py` runs this file in its own process, because the interpreter must be selected before Triton is
imported.
"""

import random

import pytest
import torch

from gdino_hf.model import msda_triton
from gdino_hf.model.ms_deform_attn import MSDeformAttn
from gdino_hf.model.msda_backends import backend_for, prefers_fused
from gdino_hf.model.msda_operator import ms_deform_attn, ms_deform_attn_fused
from gdino_hf.model.msda_reference import ms_deform_attn_reference, sampling_geometry

# Sums of at most 40 float32 products of order 1; location gradients multiply them by a level's size, at most 100.
FORWARD_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
# Results are rounded to the value's dtype once; the interpreter truncates bfloat16 instead of rounding it.
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
DTYPES = tuple(ROUNDING)
# Gradients jump where a sample lies on a cell's centre; float32 positions are accurate to this many cells.
KINK = 1e-5


def seeds(first, few, many):
    """Return `few` seeds for every run and the others, up to `many`, for -m soak, because each takes seconds."""
    return [
        *range(first, first + few),
        *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(first + few, first + many)),
    ]


@pytest.fixture(scope="module")
def kernels():
    found = msda_triton.load()
    assert found is not None
    assert found.interpreted
    return found


def random_shapes(seed):
    choose = random.Random(seed)
    shapes = [(choose.randint(1, 9), choose.randint(1, 11)) for _ in range(choose.randint(1, 5))]
    batch, queries, heads = choose.randint(1, 2), choose.randint(1, 9), choose.randint(1, 3)
    width, points = choose.choice((8, 9, 16, 24, 32, 40, 48, 64)), choose.randint(1, 8)
    return shapes, (batch, queries, heads, len(shapes), points), width, choose.choice((0.9, 1.3, 6.0, 200.0))


def on_a_kink(locations, shapes):
    cells = torch.tensor([[w, h] for h, w in shapes], dtype=torch.float64)[:, None]
    pixels = locations.double() * cells - 0.5
    beside = (pixels.abs() < 1e3) & ((pixels - pixels.round()).abs() < KINK)
    return bool(beside.any())


def draw(seed, numbers=0, dtype=torch.float32):
    """Draw a random case: value, level sizes, inputs and output gradient.

    The inputs are locations and weights if `numbers` is 0, otherwise references with that many numbers, offsets and
    logits.
    """
    shapes, size, width, spread = random_shapes(seed)
    batch, queries, heads, levels, _ = size
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, width, generator=generator).to(dtype)
    grad = torch.randn(batch, queries, heads * width, generator=generator).to(dtype)
    flat = [side for shape in shapes for side in shape]
    while True:
        if numbers == 0:
            locations = (torch.rand(*size, 2, generator=generator) - 0.5) * spread + 0.5
            weights = torch.rand(size, generator=generator)
            inputs = [locations, weights / weights.sum((-2, -1), keepdim=True)]
        else:
            references = torch.rand(batch, queries, levels, numbers, generator=generator)
            offsets = (3 * spread * torch.randn(*size, 2, generator=generator)).to(dtype)
            inputs = [references, offsets, torch.randn(size, generator=generator).to(dtype)]
            locations, _ = sampling_geometry(flat, references.double(), offsets.double(), inputs[2].double())
        if not on_a_kink(locations, shapes):
            return value, flat, inputs, grad


def assert_gradients(names, ours, theirs):
    for name, found, expected in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(
            found.double(),
            expected,
            rtol=GRADIENT_TOLERANCE + ROUNDING[found.dtype],
            atol=GRADIENT_TOLERANCE,
            msg=lambda message, name=name: f"gradient of {name}: {message}",
        )


@pytest.mark.parametrize("seed", seeds(0, 3, 12))
def test_random_shapes_equal_float64(kernels, seed):
    dtype = DTYPES[seed % 3]
    value, flat, (locations, weights), grad = draw(seed, dtype=dtype)
    exact = [x.double().requires_grad_() for x in (value, locations, weights)]
    expected = ms_deform_attn_reference(exact[0], flat, *exact[1:])
    found = kernels.forward(value, flat, locations, weights)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=ROUNDING[dtype], atol=FORWARD_TOLERANCE)
    gradients = kernels.backward(grad, value, flat, locations, weights)
    assert [x.dtype for x in gradients] == [dtype, torch.float32, torch.float32]
    assert_gradients(("value", "locations", "weights"), gradients, torch.autograd.grad(expected, exact, grad.double()))


@pytest.mark.parametrize(
    ("seed", "numbers"),
    # Each dtype and each kind of reference in every run.
    [
        *((20, 2), (21, 4), (22, 2)),
        *(pytest.param(*pair, marks=pytest.mark.soak) for pair in ((20, 4), (21, 2), (22, 4))),
        *(pytest.param(seed, numbers, marks=pytest.mark.soak) for seed in (23, 24, 25) for numbers in (2, 4)),
    ],
)
def test_fused_kernels_equal_float64(kernels, seed, numbers):
    dtype = DTYPES[seed % 3]
    value, flat, inputs, grad = draw(seed, numbers, dtype)
    exact = [x.double().requires_grad_() for x in (value, *inputs)]
    expected = ms_deform_attn_reference(exact[0], flat, *sampling_geometry(flat, *exact[1:]))
    found = kernels.forward_fused(value, flat, *inputs)
    torch.testing.assert_close(found.double(), expected, rtol=ROUNDING[dtype], atol=FORWARD_TOLERANCE)
    gradients = kernels.backward_fused(grad, value, flat, *inputs, True)
    names = ("value", "references", "offsets", "logits")
    assert_gradients(names, gradients, torch.autograd.grad(expected, exact, grad.double()))
    assert kernels.backward_fused(grad, value, flat, *inputs, False)[1].numel() == 0


@pytest.mark.parametrize(
    "bad",
    [*(float("nan"), 3e38), *(pytest.param(bad, marks=pytest.mark.soak) for bad in (float("inf"), float("-inf")))],
)
def test_non_finite_and_huge_locations_contribute_zero(kernels, bad):
    value, flat, (locations, weights), grad = draw(3)
    elsewhere = locations.clone()
    elsewhere[:, ::2, :, :, 0, 0] = 50.0
    locations[:, ::2, :, :, 0, 0] = bad
    assert torch.equal(
        kernels.forward(value, flat, locations, weights), kernels.forward(value, flat, elsewhere, weights)
    )
    for ours, theirs in zip(
        kernels.backward(grad, value, flat, locations, weights),
        kernels.backward(grad, value, flat, elsewhere, weights),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_infinite_values_reach_only_neighbouring_samples(kernels):
    value = torch.ones(1, 9, 1, 16)
    value[:, 0], value[:, 8] = float("inf"), float("nan")
    places = [[0.4, 0.4], [0.6, 0.4], [0.9, 0.9], [9.0, 9.0], [-0.1, 0.5], [0.5, 1.1], [1.1, 0.4], [-0.1, -0.1]]
    locations = torch.tensor(places).view(1, -1, 1, 1, 1, 2)
    weights = torch.ones(locations.shape[:-1])
    expected = ms_deform_attn_reference(value.double(), [3, 3], locations.double(), weights.double())
    found = kernels.forward(value, [3, 3], locations, weights)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=FORWARD_TOLERANCE, equal_nan=True)


def test_empty_batches_and_queries_are_accepted(kernels):
    value, flat, (locations, weights), grad = draw(5)
    for part in (slice(0, 0), slice(None)):
        none = locations[part, :0], weights[part, :0]
        found = kernels.forward(value[part], flat, *none)
        assert found.shape == (value[part].shape[0], 0, grad.shape[2])
        assert not kernels.backward(grad[part, :0], value[part], flat, *none)[0].any()


def test_mismatched_shapes_are_refused(kernels):
    value, flat, (locations, weights), grad = draw(5)
    with pytest.raises(ValueError, match="covers 1 tokens"):
        kernels.forward(value, [1, 1, *[0] * (len(flat) - 2)], locations, weights)
    with pytest.raises(ValueError, match="do not fit"):
        kernels.forward(value, flat, locations, weights[..., None])
    with pytest.raises(ValueError, match="heads"):
        kernels.forward(value[:, :, :0], flat, locations, weights)
    with pytest.raises(ValueError, match="grad_output"):
        kernels.backward(grad[..., :1], value, flat, locations, weights)
    with pytest.raises(ValueError, match="reference_points"):
        kernels.forward_fused(value, flat, locations[:, :, 0, :, 0, :1], locations, weights)


def test_float64_is_left_to_the_reference(kernels):
    value, _, (locations, _), _ = draw(5)
    assert kernels.supports(value, locations)
    assert not kernels.supports(value.double(), locations)
    assert not kernels.supports(value, locations.double())


def test_operators_use_the_kernels_on_request(monkeypatch):
    monkeypatch.setenv("GDINO_MSDA", "triton")
    value, flat, inputs, _ = draw(7)
    assert backend_for(value, inputs[0]) == "triton"
    assert prefers_fused("cpu")
    arguments = [x.requires_grad_() for x in (value, *inputs)]
    torch.library.opcheck(torch.ops.gdino_hf.ms_deform_attn.default, (arguments[0], flat, *arguments[1:]))
    fused = draw(8, 4)
    arguments = [x.requires_grad_() for x in (fused[0], *fused[2])]
    torch.library.opcheck(torch.ops.gdino_hf.ms_deform_attn_fused.default, (arguments[0], fused[1], *arguments[1:]))
    for operator, (value, flat, inputs, grad) in ((ms_deform_attn, draw(7)), (ms_deform_attn_fused, draw(8, 4))):
        results = []
        for name in ("triton", "torch"):
            monkeypatch.setenv("GDINO_MSDA", name)
            leaves = [x.detach().clone().requires_grad_() for x in (value, *inputs)]
            output = operator(leaves[0], flat, *leaves[1:])
            results.append((output, *torch.autograd.grad(output, leaves, grad)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=GRADIENT_TOLERANCE, atol=GRADIENT_TOLERANCE)


def test_module_accepts_one_row_of_references_for_a_batch(monkeypatch):
    """As for a batch of images without padding, whose grid points are equal."""
    torch.manual_seed(0)
    module = MSDeformAttn(16, 2, 2, 2)
    inputs = torch.randn(2, 3, 16), torch.randn(2, 14, 16), torch.rand(1, 3, 2, 2)
    results = {}
    for name in ("triton", "torch"):
        monkeypatch.setenv("GDINO_MSDA", name)
        output, _ = module(*inputs, [(3, 4), (2, 1)])
        results[name] = output, *torch.autograd.grad(output.square().sum(), list(module.parameters()))
    for ours, theirs in zip(results["triton"], results["torch"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=GRADIENT_TOLERANCE, atol=GRADIENT_TOLERANCE)


def test_whole_model_gives_the_reference_boxes(monkeypatch, tiny_model, tiny_processor):
    image = torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(0))
    inputs = tiny_processor(images=image, text=["cat", "dog"], do_rescale=False, return_tensors="pt")
    found = {}
    for name in ("triton", "torch"):
        monkeypatch.setenv("GDINO_MSDA", name)
        with torch.no_grad():
            found[name] = tiny_model(**inputs).pred_boxes
    # float32 sums in another order through a few layers.
    torch.testing.assert_close(found["triton"], found["torch"], rtol=0, atol=1e-4)
