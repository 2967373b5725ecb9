"""Claims about the operator that takes offsets and logits: it is the plain one after softmax and placement."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gdino_hf.model.ms_deform_attn import MSDeformAttn
from gdino_hf.model.msda_backends import ms_deform_attn
from gdino_hf.model.msda_fused import _cells, ms_deform_attn_fused, prefers_fused, sampling_geometry

SHAPES = [3, 4, 2, 1]
# float64 against float64, in another order of summation.
TOLERANCE = 1e-10


def make_case(numbers, dtype=torch.float64):
    generator = torch.Generator().manual_seed(numbers)
    value = torch.randn(2, 14, 2, 3, generator=generator, dtype=dtype)
    references = torch.rand(2, 3, 2, numbers, generator=generator, dtype=dtype)
    offsets = torch.randn(2, 3, 2, 2, 2, 2, generator=generator, dtype=dtype)
    logits = torch.randn(2, 3, 2, 2, 2, generator=generator, dtype=dtype)
    return [x.requires_grad_() for x in (value, references, offsets, logits)]


@pytest.fixture(autouse=True)
def _reference_backend(monkeypatch):
    monkeypatch.setenv("GDINO_MSDA", "torch")


@pytest.mark.parametrize("numbers", [2, 4])
def test_it_equals_the_plain_operator_with_every_gradient(numbers):
    value, *rest = make_case(numbers)
    fused = ms_deform_attn_fused(value, SHAPES, *rest)
    plain = ms_deform_attn(value, SHAPES, *sampling_geometry(SHAPES, *rest))
    torch.testing.assert_close(fused, plain, rtol=0, atol=TOLERANCE)
    grad = torch.randn(fused.shape, generator=torch.Generator().manual_seed(0), dtype=fused.dtype)
    names = ("value", "references", "offsets", "logits")
    ours, theirs = (torch.autograd.grad(x, (value, *rest), grad) for x in (fused, plain))
    for name, found, expected in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=0, atol=TOLERANCE, msg=lambda message, name=name: f"{name}: {message}"
        )


@pytest.mark.parametrize("numbers", [2, 4])
def test_gradients_and_registration_pass_torchs_own_checks(numbers):
    value, *rest = make_case(numbers)
    assert torch.autograd.gradcheck(lambda v, *r: ms_deform_attn_fused(v, SHAPES, *r), (value, *rest))
    torch.library.opcheck(torch.ops.gdino_hf.ms_deform_attn_fused.default, (value, SHAPES, *rest))


def test_references_without_gradient_get_none():
    value, references, offsets, logits = make_case(2)
    output = ms_deform_attn_fused(value, SHAPES, references.detach(), offsets, logits)
    assert all(x is not None for x in torch.autograd.grad(output.sum(), (value, offsets, logits)))


def test_half_precision_offsets_are_placed_in_float32():
    _, references, offsets, logits = make_case(2, torch.float32)
    locations, weights = sampling_geometry(SHAPES, references, offsets.bfloat16(), logits.bfloat16())
    assert locations.dtype == weights.dtype == torch.float32


class Names(TorchDispatchMode):
    """Which of PyTorch's operations run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def test_cells_are_width_and_height_on_any_device():
    expected = torch.tensor([[[4.0, 3.0]], [[1.0, 2.0]]])
    assert torch.equal(_cells(SHAPES, torch.empty(0)), expected)
    assert _cells(SHAPES, torch.empty(0, device="meta")).shape == expected.shape


def test_torch_and_c_backends_take_locations():
    assert not prefers_fused("cpu")


@pytest.mark.slow
def test_module_compiles_to_one_graph():
    torch.manual_seed(0)
    module = MSDeformAttn(8, 2, 2, 2)
    shapes = [(3, 4), (2, 1)]
    inputs = torch.randn(1, 3, 8), torch.randn(1, 14, 8), torch.rand(1, 3, 2, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, shapes), module(*inputs, shapes), rtol=0, atol=1e-6)


def test_disabled_kernels_leave_the_operator_out():
    module = MSDeformAttn(8, 2, 2, 2)
    module.custom_kernels = False
    inputs = torch.randn(1, 3, 8), torch.randn(1, 14, 8), torch.rand(1, 3, 2, 4)

    with Names() as names:
        module(*inputs, [(3, 4), (2, 1)])
    assert not any("ms_deform_attn" in name for name in names.seen)
    assert any("grid_sampler" in name for name in names.seen)
