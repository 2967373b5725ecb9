"""A feed-forward block with a ReLU for training on a CPU, forward and backward, without products of zeros.

The ReLU sets half of the hidden values to zero when training starts, and two thirds or more later. Their gradients are
zero as well, so of the six products of a step only the first needs all values. The C library finds the others with a
bit mask and adds up rows of a matrix for them (float_relu.h). Where it cannot run, PyTorch multiplies whole matrices.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..inference import float_linear
from ..inference.compiled_layers import check_status
from .plain_layers import add_product, all_plain, can_step, zeros_for

_ROWS = 1024
"""Rows that PyTorch multiplies at a time; with the published hidden layer of 2048 channels, they take 8 MB."""


class ReluWeights(NamedTuple):
    """Parameters of fc2(relu(fc1(x))) or their gradients: (H, D), (H,), (D, H) and (D,)."""

    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor


class ReluFunctions(NamedTuple):
    """The two functions of the C library, and the number of floats that divides D."""

    forward: Callable[..., int]
    backward: Callable[..., int]
    lanes: int


def functions_of(library: float_linear.FloatLibrary | None) -> ReluFunctions | None:
    """Return a library's functions for such a block, or None if it has none."""
    if library is None or not library.supported():
        return None
    count, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
    arguments = [count] * 3 + [pointer] * 5 + [number]
    try:
        forward = library.function("relu_forward", number, arguments + [pointer] * 2)
        backward = library.function("relu_backward", number, arguments + [pointer] * 5)
    except AttributeError:  # a library that was compiled before it had them
        return None
    return ReluFunctions(forward, backward, library.supported())


@functools.cache
def installed_functions() -> ReluFunctions | None:
    """Return the functions of the installed library, or None if there is none."""
    return functions_of(float_linear.load())


def _functions_for(weights: ReluWeights) -> ReluFunctions | None:
    """Return the C functions if they take weights of these sizes."""
    functions, (hidden, width) = installed_functions(), weights.fc1.shape
    fits = functions is not None and width % functions.lanes == 0 and hidden % 64 == 0
    return functions if fits and all(x.is_contiguous() for x in weights) else None


def relu_forward(x: Tensor, weights: ReluWeights) -> tuple[Tensor, Tensor]:
    """Compute fc2(relu(fc1(x))).

    Args:
        x: (R, D) contiguous float32 rows on the CPU.
        weights: The block's parameters.

    Returns:
        (R, D) result, and the R * H hidden values for `relu_backward`, in an order that is its own affair.
    """
    (rows, width), hidden, functions = x.shape, len(weights.fc1), _functions_for(weights)
    out, kept = torch.empty_like(x), x.new_empty(rows, hidden)
    if functions is None:
        for start in range(0, rows, _ROWS):
            here = slice(start, start + _ROWS)
            part = torch.addmm(weights.fc1_bias, x[here], weights.fc1.t(), out=kept[here]).relu_()
            torch.addmm(weights.fc2_bias, part, weights.fc2.t(), out=out[here])
        return out, kept
    tensors = (x, *weights)
    results = (kept.data_ptr(), out.data_ptr())
    threads = torch.get_num_threads()
    check_status(functions.forward(rows, width, hidden, *(y.data_ptr() for y in tensors), threads, *results))
    return out, kept


def relu_backward(grad: Tensor, x: Tensor, kept: Tensor, weights: ReluWeights, grads: ReluWeights) -> Tensor:
    """Return the gradient of x, and write those of the weights.

    Args:
        grad: (R, D) contiguous gradient of the result.
        x: (R, D) input of `relu_forward`.
        kept: What `relu_forward` returned beside the result.
        weights: The block's parameters, unchanged since then.
        grads: Zero gradients to write to; None for frozen parameters.

    Returns:
        (R, D) gradient of x.
    """
    (rows, width), hidden, functions = x.shape, len(weights.fc1), _functions_for(weights)
    grad_x = torch.empty_like(x)
    if functions is None:
        for start in range(0, rows, _ROWS):
            here = slice(start, start + _ROWS)
            add_product(grads.fc2, grads.fc2_bias, grad[here], kept[here])
            grad_part = torch.ops.aten.threshold_backward(grad[here] @ weights.fc2, kept[here], 0)
            add_product(grads.fc1, grads.fc1_bias, grad_part, x[here])
            torch.mm(grad_part, weights.fc1, out=grad_x[here])
        return grad_x
    tensors, results = (grad, x, kept, weights.fc1, weights.fc2), (grad_x, *grads)
    pointers = [None if y is None else y.data_ptr() for y in (*tensors, *results)]
    sizes, threads = (rows, width, hidden), torch.get_num_threads()
    check_status(functions.backward(*sizes, *pointers[: len(tensors)], threads, *pointers[len(tensors) :]))
    return grad_x


def relu_step(layer: Any, x: Tensor) -> Tensor | None:
    """Compute fc2(relu(fc1(x))) with a backward pass of its own.

    Args:
        layer: A layer with `fc1`, `activation`, `activation_dropout` and `fc2`, such as a DecoderLayer.
        x: (..., D) features.

    Returns:
        (..., D) result, or None where this function does not apply: without gradients, in another dtype than float32,
        on another device, or if a part of the layer is not as published.
    """
    if (
        type(layer.activation) is not nn.ReLU
        or (layer.training and layer.activation_dropout > 0)
        or not all_plain((layer.fc1, layer.fc2), ())
    ):
        return None
    weights = ReluWeights(layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias)
    return _ReluStep.apply(x, *weights) if can_step(x, *weights) else None


class _ReluStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        rows = x.contiguous().flatten(0, -2)
        out, kept = relu_forward(rows, ReluWeights(*parameters))
        ctx.save_for_backward(rows, kept, *parameters)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, kept, *parameters = ctx.saved_tensors
        weights = ReluWeights(*parameters)
        grads = ReluWeights(*zeros_for(weights, ctx.needs_input_grad[1:]))
        grad_x = relu_backward(grad.contiguous().flatten(0, -2), rows, kept, weights, grads)
        return grad_x.view(grad.shape), *grads
