"""Which numbers a model multiplies on this CPU, and through which library: a short measurement decides.

CPUs differ widely. One with AMX multiplies bfloat16 ten times faster than float32, one without AVX-512 does it ten
times slower. 8-bit products need AVX-512 VNNI. For float32 there are oneDNN and the C layers of float_linear.py, whose
speed depends on the CPU as well.
"""

import functools
import logging
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from . import float_linear, int8_linear
from .onednn import can_pack
from .packed_linear import PackedLinear
from .workers import can_split, one_thread

logger = logging.getLogger(__name__)

_ROWS, _WIDTH, _HIDDEN = 192, 256, 1024
_SECONDS = 0.02  # for one kind of products
_RUNS = 3  # at least, however slow they are
_INT8_GAIN = 1.3
"""8-bit products round more than bfloat16 ones, so they must be faster by this factor."""
_FUSED_GAIN = 1.1
"""The C layers save passes over memory that the measurement does not see."""


@dataclass(frozen=True)
class LinearKinds:
    """Classes of linear layers that replace those of a model.

    Attributes:
        tokens: For the many image tokens and queries.
        others: For the text and for the layers that produce boxes and scores, which are never rounded to 8 bits.
    """

    tokens: type[PackedLinear] = PackedLinear
    others: type[PackedLinear] = PackedLinear


@functools.cache
def product_speeds() -> dict[str, float]:
    """Measure the products of a feed-forward block on one thread, in less than a second.

    Returns:
        Billions of multiplications and additions per second of "float32" and "bfloat16" through oneDNN, and of
        "compiled float32" and "int8" through the C libraries. What cannot run here is missing.
    """
    candidates: dict[str, tuple[type[PackedLinear], torch.dtype]] = {}
    if can_pack(torch.float32):
        candidates["float32"] = PackedLinear, torch.float32
        if float_linear.load() is not None:
            candidates["compiled float32"] = float_linear.FloatLinear, torch.float32
        if int8_linear.has_int8():
            candidates["int8"] = int8_linear.Int8Linear, torch.float32
    if can_pack(torch.bfloat16):
        candidates["bfloat16"] = PackedLinear, torch.bfloat16
    return {name: _speed(kind, dtype) for name, (kind, dtype) in candidates.items()}


def _speed(kind: type[PackedLinear], dtype: torch.dtype) -> float:
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        layers = []
        for inputs, columns in ((_WIDTH, _HIDDEN), (_HIDDEN, _WIDTH)):
            linear = torch.nn.Linear(inputs, columns, dtype=dtype).requires_grad_(False)
            linear.weight.copy_(torch.randn(columns, inputs, generator=generator, dtype=torch.float32) / inputs**0.5)
            layers.append(kind(linear, "relu"))
        x = torch.randn(_ROWS, _WIDTH, generator=generator, dtype=torch.float32).to(dtype)

        def run() -> float:
            start = time.perf_counter()
            layers[1](layers[0](x))
            return time.perf_counter() - start

        def fastest() -> float:
            run()
            # The fastest of many runs, since other load on the machine can only add time.
            times = [run() for _ in range(_RUNS)]
            while sum(times) < _SECONDS:
                times.append(run())
            return min(times)

        with one_thread() if can_split() else nullcontext():
            best = fastest()
    return 4 * _ROWS * _WIDTH * _HIDDEN / best / 1e9


def speeds_to_choose_by() -> dict[str, float]:
    """Return the measured speeds; with GDINO_ARITHMETIC=fixed, typical ones, from which every process chooses alike.

    Two measurements may choose differently where two kinds are about as fast, and their results differ in the last
    digits. Bulk work whose parts are done by several processes, or later, needs one choice.
    """
    if os.environ.get("GDINO_ARITHMETIC") != "fixed":
        return product_speeds()
    speeds = {"float32": 50.0}
    if float_linear.load() is not None:
        speeds["compiled float32"] = 60.0
    if int8_linear.has_int8():
        speeds["int8"] = 150.0
    if can_pack(torch.bfloat16):
        speeds["bfloat16"] = 500.0 if torch.cpu._is_amx_tile_supported() else 40.0
    return speeds


def bfloat16_is_slower() -> bool:
    """Return whether this CPU multiplies float32 matrices faster than bfloat16 ones.

    It does if it has neither AMX nor full-rate bfloat16 units; on CPUs without AVX-512, oneDNN has no bfloat16 at all.
    """
    speeds = speeds_to_choose_by()
    exact = max(speeds.get(name, 0.0) for name in ("float32", "compiled float32"))
    return 0.9 * exact > speeds.get("bfloat16", 0.0)


def choose_arithmetic(model: Any, int8: bool | None) -> LinearKinds:
    """Choose the kinds of linear layers for a model on a CPU, and convert it to float32 if that is faster.

    Args:
        model: The model, float32 or bfloat16; others keep oneDNN's layers.
        int8: True requires 8-bit products and False forbids them; None uses them for a bfloat16 model where they are
            the fastest.

    Returns:
        The classes. One log line says what was chosen, and what was measured.

    Raises:
        ValueError: `int8` is True and cannot be used here.
    """
    if int8:
        int8_linear.check_int8(model.device, model.dtype)
    if model.device.type != "cpu" or model.dtype not in (torch.float32, torch.bfloat16):
        return LinearKinds()
    speeds = speeds_to_choose_by()
    measured = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
    half = model.dtype == torch.bfloat16
    slow = half and bfloat16_is_slower()
    if int8 is None:
        int8 = half and speeds.get("int8", 0.0) > _INT8_GAIN * speeds.get("bfloat16", 0.0)
    compiled = speeds.get("compiled float32", 0.0) * _FUSED_GAIN > speeds.get("float32", 0.0)
    exact: type[PackedLinear] = float_linear.FloatLinear if compiled else PackedLinear
    if half and (int8 or slow):
        model.float()
        reason = "8-bit products are fastest" if not slow else "This CPU is slow at bfloat16"
        now = "uses 8-bit products for image tokens and queries, and float32 elsewhere" if int8 else "uses float32"
        logger.warning("%s: the model now %s. Measured, in GFLOP/s on one thread: %s.", reason, now, measured)
    elif half:
        exact = PackedLinear
        logger.info("The model stays in bfloat16. Measured, in GFLOP/s on one thread: %s.", measured)
    else:
        chosen = "8-bit products for image tokens and queries, " if int8 else ""
        chosen += "float32 in compiled layers" if compiled else "float32 in oneDNN"
        logger.info("The model uses %s. Measured, in GFLOP/s on one thread: %s.", chosen, measured)
    return LinearKinds(int8_linear.Int8Linear if int8 else exact, exact)
