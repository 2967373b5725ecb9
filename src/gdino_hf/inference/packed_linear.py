"""Linear layers through oneDNN with weights in its own layout: what inference on a CPU gains most from.

The layout depends on the machine, so it is made when a layer first runs, beside the published weights, which stay what
is saved. Where a compiler traces, autograd records or a GPU computes, a packed layer is an ordinary one.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}


def pack(weight: Tensor) -> Tensor:
    """(N, C) weight to oneDNN's own layout for this machine, opaque to other operations."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """activation(x W^T + b) of (..., C), "none", "relu" or "gelu"."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "none" if activation == "gelu" else "")


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch packs weights of a dtype and computes the right thing with them."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        # Whole numbers below 256, which every dtype holds.
        weight = torch.arange(6, dtype=dtype, device="cpu").view(2, 3)
        found = packed_linear(weight.new_ones(4, 3), pack(weight), weight.new_ones(2), "relu")
        return torch.equal(found.float(), found.new_tensor([[4.0, 13.0]], dtype=torch.float32).expand(4, 2))
    except (AttributeError, RuntimeError):
        return False


@functools.cache
def bfloat16_is_slower() -> bool:
    """Whether float32 products are the faster ones here, as on a CPU with half-rate bfloat16 units and no AMX."""
    if not (can_pack(torch.float32) and can_pack(torch.bfloat16)):
        return False
    x, weight = (torch.ones(rows, 256, dtype=torch.float32, device="cpu") for rows in (512, 1024))
    half, packed, packed_half = x.bfloat16(), pack(weight), pack(weight.bfloat16())
    # The best of many: other work on the machine only ever adds.
    best = {True: float("inf"), False: float("inf")}
    for _ in range(16):
        for wide in (True, False):
            start = time.perf_counter()
            packed_linear(half.float(), packed, None).bfloat16() if wide else packed_linear(half, packed_half, None)
            best[wide] = min(best[wide], time.perf_counter() - start)
    return best[True] < 0.9 * best[False]


class PackedLinear(nn.Linear):
    """An nn.Linear with the same parameters, faster where nothing is recorded, traced or moved off the CPU.

    Args:
        linear: The layer to stand for; its parameters are shared.
        activation: What follows it, "none", "relu" or "gelu", computed with it.
    """

    def __init__(self, linear: nn.Linear, activation: str = "none") -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.activation = activation
        self._packed: tuple | None = None
        self.train(linear.training)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., N)."""
        weight = self.weight
        if not runs_packed(x, weight):
            return _ACTIVATIONS[self.activation](F.linear(x, weight, self.bias))
        key = state_of(weight)
        if self._packed is None or self._packed[0] != key:
            self._packed = (key, pack(weight))
        return packed_linear(x, self._packed[1], self.bias, self.activation)


def side_by_side(layers: Sequence[nn.Linear], kind: type[PackedLinear] = PackedLinear) -> Any:
    """One layer of a kind for several of the same input; its output holds theirs, one after the other."""
    # Out of inference mode, so that what is made there serves elsewhere too.
    with torch.inference_mode(False):
        joint = nn.Linear(1, 1, bias=layers[0].bias is not None)
        joint.in_features, joint.out_features = layers[0].in_features, sum(layer.out_features for layer in layers)
        for name in ("weight", "bias"):
            parts = [getattr(layer, name) for layer in layers]
            if parts[0] is not None:
                joined = torch.cat([part.detach() for part in parts])
                setattr(joint, name, nn.Parameter(joined, requires_grad=False))
        return kind(joint)


def state_of(*weights: Tensor) -> tuple:
    """Changes when one of the weights is replaced or written to, so that what was made of them is made anew."""
    return tuple((x.data_ptr(), 0 if x.is_inference() else x._version) for x in weights)


def runs_packed(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of these may take the packed path."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.numel() > 0
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and can_pack(x.dtype)
    )
