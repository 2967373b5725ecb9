"""Claims about the choice between float32, bfloat16 and 8-bit products."""

import copy

import pytest
import torch
from torch import nn

from gdino_hf.inference import arithmetic, int8_linear
from gdino_hf.inference.arithmetic import LinearKinds, bfloat16_is_slower, choose_arithmetic, product_speeds
from gdino_hf.inference.float_linear import FloatLinear, load
from gdino_hf.inference.int8_linear import Int8Linear, has_int8
from gdino_hf.inference.onednn import can_pack
from gdino_hf.inference.packed_linear import PackedLinear

# GFLOP/s on one thread, as measured on CPUs of these kinds
AVX2 = {"float32": 78.0, "compiled float32": 89.0}
VNNI = {"float32": 140.0, "compiled float32": 150.0, "bfloat16": 20.0, "int8": 420.0}
AVX512_BF16 = {"float32": 140.0, "compiled float32": 100.0, "bfloat16": 260.0, "int8": 500.0}
AMX = {"float32": 140.0, "compiled float32": 135.0, "bfloat16": 900.0, "int8": 450.0}


class Stub(nn.Linear):
    device = torch.device("cpu")

    def __init__(self, dtype):
        super().__init__(2, 2, dtype=dtype)
        self.dtype = dtype


@pytest.mark.parametrize(
    ("speeds", "dtype", "int8", "kinds", "becomes"),
    [
        (AVX2, torch.float32, None, (FloatLinear, FloatLinear), torch.float32),
        (AVX2, torch.bfloat16, None, (FloatLinear, FloatLinear), torch.float32),
        ({}, torch.bfloat16, None, (PackedLinear, PackedLinear), torch.bfloat16),
        (VNNI, torch.float32, None, (FloatLinear, FloatLinear), torch.float32),
        (VNNI, torch.bfloat16, None, (Int8Linear, FloatLinear), torch.float32),
        (VNNI, torch.bfloat16, False, (FloatLinear, FloatLinear), torch.float32),
        (AVX512_BF16, torch.bfloat16, None, (Int8Linear, PackedLinear), torch.float32),
        (AVX512_BF16, torch.bfloat16, False, (PackedLinear, PackedLinear), torch.bfloat16),
        (AVX512_BF16, torch.float32, None, (PackedLinear, PackedLinear), torch.float32),
        (AMX, torch.bfloat16, None, (PackedLinear, PackedLinear), torch.bfloat16),
        (AMX, torch.float32, None, (FloatLinear, FloatLinear), torch.float32),
    ],
)
def test_the_fastest_arithmetic_that_may_be_used_is_chosen(monkeypatch, caplog, speeds, dtype, int8, kinds, becomes):
    monkeypatch.setattr(arithmetic, "product_speeds", lambda: speeds)
    model = Stub(dtype)
    with caplog.at_level("INFO", "gdino_hf"):
        assert choose_arithmetic(model, int8) == LinearKinds(*kinds)
    assert model.weight.dtype == becomes
    (record,) = caplog.records
    assert all(f"{name} {speed:.0f}" in record.message for name, speed in speeds.items())
    # A model whose dtype changes says so by default; other choices are there for those who ask.
    assert (record.levelname == "WARNING") == (dtype != becomes)


def test_what_was_measured_is_what_runs_here():
    speeds = product_speeds()
    assert ("float32" in speeds) == can_pack(torch.float32)
    assert ("bfloat16" in speeds) == can_pack(torch.bfloat16)
    assert ("int8" in speeds) == has_int8()
    assert ("compiled float32" in speeds) == (load() is not None)
    # A core that computes is faster than 0.1 GFLOP/s and slower than 20,000.
    assert all(0.1 < speed < 20_000 for speed in speeds.values())
    assert bfloat16_is_slower() in (True, False)
    assert product_speeds() is speeds, "measured again"


def test_int8_on_request_is_checked_first(monkeypatch):
    monkeypatch.setattr(int8_linear, "load", lambda: None)
    monkeypatch.setattr(int8_linear, "find_compiled", lambda name: "_int8_cpu.so")
    with pytest.raises(ValueError, match="AVX-512 VNNI"):
        choose_arithmetic(Stub(torch.float32), True)


def test_int8_is_true_false_or_none(tiny_model):
    with pytest.raises(ValueError, match="int8 must be True or False, got 'no'"):
        copy.deepcopy(tiny_model).optimize_for_inference(int8="no")
