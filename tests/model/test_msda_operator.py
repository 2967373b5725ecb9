"""Claims about the fused operator: it equals the plain one applied to the sampling geometry."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gdino_hf.model.ms_deform_attn import MSDeformAttn
from gdino_hf.model.msda_backends import prefers_fused
from gdino_hf.model.msda_operator import ms_deform_attn, ms_deform_attn_fused
from gdino_hf.model.msda_reference import _level_sizes, sampling_geometry

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
def test_fused_equals_plain_operator_with_every_gradient(numbers):
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
def test_gradients_and_registration_pass_torch_checks(numbers):
    value, *rest = make_case(numbers)
    assert torch.autograd.gradcheck(lambda v, *r: ms_deform_attn_fused(v, SHAPES, *r), (value, *rest))
    torch.library.opcheck(torch.ops.gdino_hf.ms_deform_attn_fused.default, (value, SHAPES, *rest))


def test_references_that_need_no_gradient_get_none():
    value, references, offsets, logits = make_case(2)
    output = ms_deform_attn_fused(value, SHAPES, references.detach(), offsets, logits)
    assert all(x is not None for x in torch.autograd.grad(output.sum(), (value, offsets, logits)))


def test_half_precision_offsets_give_float32_locations():
    _, references, offsets, logits = make_case(2, torch.float32)
    locations, weights = sampling_geometry(SHAPES, references, offsets.bfloat16(), logits.bfloat16())
    assert locations.dtype == weights.dtype == torch.float32


class Names(TorchDispatchMode):
    """Records the names of the PyTorch operations that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def test_level_sizes_are_width_and_height_on_any_device():
    expected = torch.tensor([[[4.0, 3.0]], [[1.0, 2.0]]])
    assert torch.equal(_level_sizes(SHAPES, torch.empty(0)), expected)
    assert _level_sizes(SHAPES, torch.empty(0, device="meta")).shape == expected.shape


def test_cpu_backends_do_not_prefer_the_fused_operator():
    assert not prefers_fused("cpu")


@pytest.mark.slow
def test_module_compiles_to_one_graph():
    torch.manual_seed(0)
    module = MSDeformAttn(8, 2, 2, 2)
    shapes = [(3, 4), (2, 1)]
    inputs = torch.randn(1, 3, 8), torch.randn(1, 14, 8), torch.rand(1, 3, 2, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, shapes)[0], module(*inputs, shapes)[0], rtol=0, atol=1e-6)


def test_disabled_kernels_do_not_call_the_operator():
    module = MSDeformAttn(8, 2, 2, 2)
    module.custom_kernels = False
    inputs = torch.randn(1, 3, 8), torch.randn(1, 14, 8), torch.rand(1, 3, 2, 4)

    with Names() as names:
        module(*inputs, [(3, 4), (2, 1)])
    assert not any("ms_deform_attn" in name for name in names.seen)
    assert any("grid_sampler" in name for name in names.seen)
