"""Accuracy and speed of each backend of the sampling operator, beside grid_sample and a plain copy."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from measure import alternate
from torch import Tensor

from gdino_hf.model.msda_backends import backend_for
from gdino_hf.model.msda_operator import ms_deform_attn, ms_deform_attn_fused
from gdino_hf.model.msda_reference import ms_deform_attn_reference, sampling_geometry

# batch, levels, heads, channels per head, points, queries (None: one query per image token, as in an encoder)
SHAPES: dict[str, tuple] = {
    "encoder 800x1333": (1, [(100, 167), (50, 84), (25, 42), (13, 21)], 8, 32, 4, None),
    "encoder 800x1333, batch 8": (8, [(100, 167), (50, 84), (25, 42), (13, 21)], 8, 32, 4, None),
    "900 queries 800x1333": (1, [(100, 167), (50, 84), (25, 42), (13, 21)], 8, 32, 4, 900),
    "900 queries 800x1333, batch 8": (8, [(100, 167), (50, 84), (25, 42), (13, 21)], 8, 32, 4, 900),
}
# Relative to the largest element: half-precision values are rounded once, their gradients once more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Set GDINO_MSDA for the duration of a `with` block."""
    before = os.environ.get("GDINO_MSDA")
    os.environ["GDINO_MSDA"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["GDINO_MSDA"]
        else:
            os.environ["GDINO_MSDA"] = before


def make_inputs(shape: tuple, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Random value, references, offsets of a few cells and logits, with the locations and weights that follow."""
    batch, levels, heads, width, points, queries = shape
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    flat = [side for level in levels for side in level]
    tokens = sum(h * w for h, w in levels)
    value = torch.randn(batch, tokens, heads, width, **options).to(dtype)
    if queries is None:
        grids = [
            torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy") for h, w in levels
        ]
        references = torch.cat([torch.stack(grid, -1).flatten(0, 1) for grid in grids]).to(device)
        references = references[None, :, None].expand(batch, -1, len(levels), -1).contiguous()
    else:
        references = torch.rand(batch, queries, len(levels), 2, **options)
    size = batch, references.shape[1], heads, len(levels), points
    offsets = (3 * torch.randn(*size, 2, **options)).to(dtype)
    logits = torch.randn(size, **options).to(dtype)
    locations, weights = sampling_geometry(flat, references, offsets, logits)
    return {
        "flat": flat,
        "plain": [value, locations, weights],
        "fused": [value, references, offsets, logits],
        "grad": torch.randn(batch, size[1], heads * width, **options).to(dtype),
    }


def traffic(inputs: dict[str, Any], backward: bool) -> int:
    """Bytes that every implementation of the plain operator must move: each tensor once."""
    value, locations, weights = inputs["plain"]
    grad = inputs["grad"]
    total = sum(x.numel() * x.element_size() for x in (value, locations, weights, grad))
    return 2 * total if backward else total


def call(inputs: dict[str, Any], kind: str, backward: bool) -> Any:
    """Return a function without arguments that runs the "plain", "fused" or "reference" operator."""
    operators = {"plain": ms_deform_attn, "fused": ms_deform_attn_fused, "reference": ms_deform_attn_reference}
    tensors = inputs["fused" if kind == "fused" else "plain"]

    def forward() -> Tensor:
        with torch.no_grad():
            return operators[kind](tensors[0], inputs["flat"], *tensors[1:])

    def both() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = operators[kind](leaves[0], inputs["flat"], *leaves[1:])
        return (output.detach(), *torch.autograd.grad(output, leaves, inputs["grad"]))

    return both if backward else forward


def check(name: str, kind: str, shape: tuple, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Compare output and gradients with float64; return the largest errors, relative to each tensor's largest element.

    Raises:
        RuntimeError: The backend does not run here, or an error exceeds the tolerance.
    """
    inputs = make_inputs(shape, dtype, device)
    exact = {key: [x.double() for x in inputs[key]] for key in ("plain", "fused")}
    exact |= {"flat": inputs["flat"], "grad": inputs["grad"].double()}
    with backend("torch"):
        expected = call(exact, kind, True)()
    with backend(name):
        running = backend_for(*inputs["plain"][:2])
        if running != name:
            raise RuntimeError(f"{name} does not run here, {running} does")
        found = call(inputs, kind, True)()
    parts = ("output", "value", *(("locations", "weights") if kind == "plain" else ("references", "offsets", "logits")))
    errors = {
        part: ((ours.double() - theirs).abs().max() / theirs.abs().max()).item()
        for part, ours, theirs in zip(parts, found, expected, strict=True)
    }
    wrong = {part: error for part, error in errors.items() if not error < TOLERANCE[dtype]}
    if wrong:
        raise RuntimeError(f"{name} {kind} in {dtype} differs from float64 by {wrong} of the largest element")
    return errors


def community_kernel() -> Any:
    """Load the Hub's older kernel of the same operator.

    Raises:
        Exception: It cannot be loaded.
    """
    from kernels import get_kernel

    return get_kernel("kernels-community/deformable-detr", version=1)


def community_call(kernel: Any, inputs: dict[str, Any]) -> Any:
    """Return a function without arguments that runs the older kernel, which takes all inputs in the value's dtype."""
    value, locations, weights = (x.to(inputs["grad"].dtype) for x in inputs["plain"])
    shapes = torch.tensor(inputs["flat"], device=value.device).view(-1, 2)
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
    step = min(64, value.shape[0])
    return lambda: kernel.ms_deform_attn_forward(value, shapes, starts, locations, weights, step)


def time_shape(
    shape: tuple,
    dtype: torch.dtype,
    device: str,
    backends: list[str],
    bandwidth: float,
    repeats: int,
    community: Any = None,
    backward: bool = False,
) -> dict[str, Any]:
    """Time the forward, or forward with backward.

    Returns:
        Median milliseconds by name, and the time that a copy of the data takes ("copy limit").
    """
    inputs = make_inputs(shape, dtype, device)
    functions = {"grid_sample": call(inputs, "reference", backward)}
    for name in backends:
        functions[name] = _under(name, call(inputs, "plain", backward))
    if "triton" in backends:
        functions["triton fused"] = _under("triton", call(inputs, "fused", backward))
    if community is not None and not backward:
        functions["kernels-community"] = community_call(community, inputs)
    return {
        "milliseconds": alternate(functions, device, repeats),
        "copy limit": traffic(inputs, backward) / bandwidth * 1e3,
    }


def _under(name: str, function: Any) -> Any:
    def run() -> Any:
        with backend(name):
            return function()

    return run
