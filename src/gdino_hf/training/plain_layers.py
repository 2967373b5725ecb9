"""What the hand-written training steps have in common: when they apply, and products that add up gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model.fusion import is_plain


def can_step(*tensors: Tensor) -> bool:
    """Return whether a hand-written forward and backward may compute with these tensors.

    It may for float32 on a CPU while gradients are recorded, outside compilers, exporters, autocast and functorch.

    Args:
        tensors: Inputs and parameters.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and any(x.requires_grad for x in tensors)
        and all(
            type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors
        )
    )


def all_plain(linears: Iterable[nn.Module], norms: Iterable[nn.Module]) -> bool:
    """Return whether linear layers and layer norms are nothing but their equation: no adapters, no hooks.

    Args:
        linears: Layers that must be `nn.Linear` with a bias.
        norms: Layers that must be `nn.LayerNorm` with weight and bias.
    """
    return all(is_plain(x) and x.bias is not None for x in linears) and all(_is_plain_norm(x) for x in norms)


def _is_plain_norm(norm: nn.Module) -> bool:
    hooks = (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks)
    return type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None and not any(hooks)


def zeros_for(weights: Iterable[Tensor], needed: Sequence[bool]) -> list[Any]:
    """Return a zero gradient for each parameter that needs one, and None for the others, which are frozen.

    Args:
        weights: Parameters.
        needed: Whether each needs a gradient.
    """
    return [torch.zeros_like(x) if need else None for x, need in zip(weights, needed, strict=True)]


def add_product(grad_weight: Tensor | None, grad_bias: Tensor | None, grad_output: Tensor, x: Tensor) -> None:
    """Add the gradients of a linear layer's weight (N, C) and bias (N,) over some rows, in place.

    Args:
        grad_weight: (N, C) gradient to add to; None if the weight is frozen.
        grad_bias: (N,) gradient to add to; None if the bias is frozen.
        grad_output: (R, N) gradient of the layer's output.
        x: (R, C) input of the layer.
    """
    if grad_weight is not None:
        grad_weight.addmm_(grad_output.t(), x)
    if grad_bias is not None:
        grad_bias += grad_output.sum(0)


class LayerNormStep:
    """Layer normalization of (R, D) rows, forward and backward.

    Args:
        weight: (D,) weight.
        bias: (D,) bias.
        eps: Added to the variance.
    """

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the normalized rows, and their statistics for `backward`."""
        normed, *statistics = torch.native_layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return normed, (statistics[0], statistics[1])

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        statistics: tuple[Tensor, Tensor],
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
    ) -> Tensor:
        """Return the gradient of x, and add those of weight and bias in place.

        Args:
            grad: (R, D) gradient of the output.
            x: (R, D) input.
            statistics: What the forward returned beside the output.
            grad_weight: (D,) gradient to add to; None if the weight is frozen.
            grad_bias: (D,) gradient to add to; None if the bias is frozen.
        """
        wanted = [True, grad_weight is not None, grad_bias is not None]
        grad_x, weight, bias = torch.ops.aten.native_layer_norm_backward(
            grad, x, self.weight.shape, *statistics, self.weight, self.bias, wanted
        )
        if grad_weight is not None:
            grad_weight += weight
        if grad_bias is not None:
            grad_bias += bias
        return grad_x
