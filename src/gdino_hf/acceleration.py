"""`gdino_hf.accelerate(model)`: this package's sampling for every model in transformers with deformable attention.

transformers writes the sampling in three ways: as a module without parameters (Grounding DINO, Deformable DETR,
RT-DETR, OmDet-Turbo, RF-DETR, ...), as a function a module holds (D-FINE) and as a function of a file (Mask2Former,
OneFormer, RT-DETRv2). Only the model given is changed; its parameters, configuration and files stay as they are.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model.msda_backends import ms_deform_attn

_MODULE = "MultiScaleDeformableAttention"
_HELD = "ms_deformable_attn_core"


class MultiScaleDeformableAttention(nn.Module):
    """The sampling as transformers calls it, without state: also a layer for `kernels.kernelize`."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Sequence[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """Sample.

        Args:
            value: (B, S, M, Dh).
            value_spatial_shapes: (L, 2) h, w of each level; not read, so that no device is waited for.
            value_spatial_shapes_list: The same as numbers.
            level_start_index: (L,); not read.
            sampling_locations: (B, Q, M, L, K, 2) xy in [0, 1] of each level.
            attention_weights: (B, Q, M, L, K).
            im2col_step: Not read; other kernels cut the batch by it.

        Returns:
            (B, Q, M * Dh).
        """
        return sample(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def sample(
    value: Tensor,
    value_spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The sampling as Mask2Former and OneFormer call it; see `MultiScaleDeformableAttention.forward`."""
    shapes = [int(side) for shape in value_spatial_shapes for side in shape]
    return ms_deform_attn(value, shapes, sampling_locations, attention_weights)


def sample_points_per_level(
    value: Tensor,
    value_spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    """The sampling as RT-DETRv2 and D-FINE call it: levels may differ in their number of points.

    Args:
        value: (B, S, M, Dh).
        value_spatial_shapes: h, w of each level.
        sampling_locations: (B, Q, M, sum of points, 2) xy in [0, 1] of each level.
        attention_weights: (B, Q, M, sum of points).
        num_points_list: Points of each level.
        method: "default", bilinear.

    Returns:
        (B, Q, M * Dh).

    Raises:
        ValueError: method is another one.
    """
    if method != "default":
        raise ValueError(f"method={method!r} is not bilinear sampling; only 'default' can be accelerated.")
    counts = [int(count) for count in num_points_list]
    most = max(counts)

    def by_level(x: Tensor, axis: int) -> Tensor:
        """Levels and points as two axes, short levels filled up with points of no weight."""
        pads = [(0, 0) * (x.ndim - 1 - axis) + (0, most - count) for count in counts]
        return torch.stack([F.pad(part, pad) for part, pad in zip(x.split(counts, axis), pads, strict=True)], axis)

    return sample(value, value_spatial_shapes, by_level(sampling_locations, 3), by_level(attention_weights, 3))


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "multi_scale_deformable_attention": sample,
    "multi_scale_deformable_attention_v2": sample_points_per_level,
}


def accelerate(model: nn.Module) -> nn.Module:
    """Swap the sampling of a transformers model for this package's operator; outputs stay, to rounding.

    Works for inference and training, in eager mode and under torch.compile. Weights and what is saved are untouched.

    Args:
        model: Any model with multi-scale deformable attention: Grounding DINO, MM-Grounding-DINO, Deformable DETR,
            RT-DETR, RT-DETRv2, D-FINE, Mask2Former, OneFormer, OmDet-Turbo, ... It is changed in place.

    Returns:
        The model.

    Raises:
        ValueError: Nothing in the model samples in a way that is known here.
    """
    if sum([_swap(module) for module in list(model.modules())]) == 0:
        raise ValueError(
            f"{type(model).__name__} has no multi-scale deformable attention that is known here; accelerate() serves "
            "models such as GroundingDino, DeformableDetr, RTDetr, RTDetrV2, Mask2Former and OmDetTurbo."
        )
    return model


def _swap(host: nn.Module) -> int:
    """Swap what one module samples with; the number of places found, those done before included."""
    found = 0
    for name, child in list(host.named_children()):
        if type(child).__name__ == _MODULE:
            found += 1
            if not isinstance(child, MultiScaleDeformableAttention):
                setattr(host, name, MultiScaleDeformableAttention().train(child.training))
    if getattr(host, "method", "default") != "default":
        return found
    if getattr(getattr(host, _HELD, None), "__name__", None) in (*_FUNCTIONS, sample_points_per_level.__name__):
        setattr(host, _HELD, sample_points_per_level)
        return found + 1
    host_class: Any = type(host)
    code = getattr(inspect.unwrap(host_class.forward), "__code__", None)
    called = [name for name in _FUNCTIONS if code is not None and name in code.co_names]
    if called and not getattr(host_class, "_gdino_accelerated", False):
        host.__class__ = _rebound(host_class)
    return found + len(called)


@functools.cache
def _rebound(host_class: Any) -> Any:
    """A class like the given one whose forward finds our functions under the names it calls."""
    forward: Any = inspect.unwrap(host_class.forward)
    names = {**forward.__globals__, **_FUNCTIONS}
    # torch.compile keeps what it made of a function with its code and global names: neither may be the original's.
    code = forward.__code__.replace()
    ours = types.FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__

    def reduce(self: nn.Module) -> tuple[Any, ...]:
        """Copies and pickles name the class of transformers, which can be found by its name."""
        return _restore, (host_class,), self.__getstate__()

    body = {"forward": ours, "_gdino_accelerated": True, "__doc__": host_class.__doc__, "__reduce__": reduce}
    return type(host_class.__name__, (host_class,), body)


def _restore(host_class: Any) -> nn.Module:
    """An empty module of a class that was swapped, for `pickle` to fill."""
    rebound = _rebound(host_class)
    return rebound.__new__(rebound)
