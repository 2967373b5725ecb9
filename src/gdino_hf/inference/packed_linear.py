"""Linear layers that run on prepacked weights, and helpers for all layers that replace a module.

Most of a CPU's time goes into linear layers, and a weight in oneDNN's own layout makes them faster. The layout depends
on the machine, so a layer makes its packed copy when it first runs and keeps the published weight beside it, which is
what `state_dict` and `save_pretrained` see. Under autograd, a compiler or on a GPU, a packed layer behaves like an
ordinary one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .onednn import can_pack, pack, packed_linear

_ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}


def share_state(replacement: nn.Module, module: nn.Module) -> None:
    """Copy every attribute of the replaced module to its replacement: parameters, sub-modules, hooks and settings.

    Parameters and sub-modules are the same objects. The dictionaries that hold them are copied, so assigning another
    sub-module to the replacement leaves the original as it was.

    Args:
        replacement: A module whose class derives from that of `module`.
        module: The module to replace.
    """
    for name, value in module.__dict__.items():
        replacement.__dict__[name] = value.copy() if isinstance(value, (dict, set)) else value


class PackedLinear(nn.Linear):
    """A linear layer that shares another one's parameters and runs on packed weights where possible.

    Args:
        linear: The layer to replace; its parameters are shared.
        activation: Activation that follows the layer and is computed with it: "none", "relu" or "gelu".
    """

    def __init__(self, linear: nn.Linear, activation: str = "none") -> None:
        nn.Module.__init__(self)
        share_state(self, linear)
        self.activation = activation
        self._packed: tuple | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., N)."""
        weight = self.weight
        if not runs_packed(x, weight):
            return _ACTIVATIONS[self.activation](F.linear(x, weight, self.bias))
        key = state_of(weight)
        if self._packed is None or self._packed[0] != key:
            self._packed = (key, pack(weight))
        return packed_linear(x, self._packed[1], self.bias, self.activation)

    def writer(self, x: Tensor) -> Callable[..., None]:
        """Return a function that writes results of inputs like x, looked up once for all blocks of rows.

        Args:
            x: A tensor with the dtype and the device of all inputs.

        Returns:
            A function of a contiguous tensor (..., N) that takes the result, an input (..., C), and an addend of the
            input or None.
        """
        return self._write

    def _write(self, output: Tensor, x: Tensor, addend: Tensor | None = None) -> None:
        output.copy_(self(x if addend is None else x + addend))


def side_by_side(layers: Sequence[nn.Linear], kind: type[PackedLinear] = PackedLinear) -> Any:
    """Join linear layers with the same input into one.

    Args:
        layers: The layers; all have a bias or none has.
        kind: Class of the joint layer.

    Returns:
        A layer whose output is the concatenation of their outputs.
    """
    # Outside inference mode, because tensors made inside it could not be used elsewhere.
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
    """Return a key that changes when a weight is replaced or modified, so that derived copies can be rebuilt."""
    return tuple((x.data_ptr(), 0 if x.is_inference() else x._version) for x in weights)


def runs_packed(x: Tensor, weight: Tensor) -> bool:
    """Return whether the product of an input and a weight may run on a packed copy of the weight."""
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
