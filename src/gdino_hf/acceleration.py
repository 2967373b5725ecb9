"""`gdino_hf.use_fast_attention(model)`: this package's sampling operator for other models of transformers.

transformers has three forms of multi-scale deformable attention: a module without parameters (Grounding DINO,
Deformable DETR, RT-DETR, OmDet-Turbo, RF-DETR, ...), a function stored in a module (D-FINE), and a function of the
model's file (Mask2Former, OneFormer, RT-DETRv2). Each has its own way of being replaced below. Only the given model is
changed; its parameters, configuration and saved files stay as they are.

All three are found by names inside transformers that have no stability promise (`_MODULE`, `_ATTRIBUTE` and
`_FUNCTIONS`; tried with transformers 5.23). If a release renames them, `use_fast_attention` refuses the model with a
ValueError, and the model keeps its own sampling.
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

from .model.msda_operator import ms_deform_attn

_MODULE = "MultiScaleDeformableAttention"
_ATTRIBUTE = "ms_deformable_attn_core"


class MultiScaleDeformableAttention(nn.Module):
    """Sampling with the signature of transformers' module of this name; also a layer for `kernels.kernelize`."""

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
        """Sample every level bilinearly and sum with the attention weights.

        Args:
            value: (B, S, M, Dh) values of all levels, one level after the other.
            value_spatial_shapes: (L, 2) height and width of each level. Unused: reading it would wait for the device.
            value_spatial_shapes_list: (height, width) of each level as integers.
            level_start_index: (L,) first token of each level. Unused: it follows from the sizes.
            sampling_locations: (B, Q, M, L, K, 2) xy in [0, 1] of each level.
            attention_weights: (B, Q, M, L, K) weights.
            im2col_step: Number of images that other kernels process at once. Unused.

        Returns:
            (B, Q, M * Dh) in value's dtype.
        """
        return sample(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def sample(
    value: Tensor,
    value_spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sample with the signature of the function in Mask2Former's and OneFormer's files.

    Args:
        value: (B, S, M, Dh) values of all levels, one level after the other.
        value_spatial_shapes: (height, width) of each level.
        sampling_locations: (B, Q, M, L, K, 2) xy in [0, 1] of each level.
        attention_weights: (B, Q, M, L, K) weights.

    Returns:
        (B, Q, M * Dh) in value's dtype.
    """
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
    """Sample with the signature of the function in RT-DETRv2 and D-FINE, where each level has its own number of points.

    Args:
        value: (B, S, M, Dh) values of all levels, one level after the other.
        value_spatial_shapes: (height, width) of each level.
        sampling_locations: (B, Q, M, P, 2) xy in [0, 1] of each level, P being the sum of `num_points_list`.
        attention_weights: (B, Q, M, P) weights.
        num_points_list: Number of points of each level.
        method: Sampling method; only "default", bilinear sampling, is supported.

    Returns:
        (B, Q, M * Dh) in value's dtype.

    Raises:
        ValueError: `method` is not "default".
    """
    if method != "default":
        raise ValueError(f"method={method!r} is not bilinear sampling: only 'default' is supported here.")
    counts = [int(count) for count in num_points_list]
    most = max(counts)

    def by_level(x: Tensor, axis: int) -> Tensor:
        """Split an axis into levels and points; levels with fewer points are padded by points of weight zero."""
        pads = [(0, 0) * (x.ndim - 1 - axis) + (0, most - count) for count in counts]
        return torch.stack([F.pad(part, pad) for part, pad in zip(x.split(counts, axis), pads, strict=True)], axis)

    return sample(value, value_spatial_shapes, by_level(sampling_locations, 3), by_level(attention_weights, 3))


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "multi_scale_deformable_attention": sample,
    "multi_scale_deformable_attention_v2": sample_points_per_level,
}


def use_fast_attention(model: nn.Module) -> nn.Module:
    """Make a model of transformers use this package's deformable attention; outputs change by rounding only.

    It works for inference and training, in eager mode and under torch.compile. Weights and saved files do not change.

    Args:
        model: Any model with multi-scale deformable attention: Grounding DINO, MM-Grounding-DINO, Deformable DETR,
            RT-DETR, RT-DETRv2, D-FINE, Mask2Former, OneFormer, OmDet-Turbo, ... It is changed in place.

    Returns:
        The model.

    Raises:
        ValueError: The model has no deformable attention, or none in a form that is known here.
    """
    if sum([_swap(module) for module in list(model.modules())]) == 0:
        raise ValueError(
            f"{type(model).__name__} has no multi-scale deformable attention that is known here: use_fast_attention() "
            "is for models such as GroundingDino, DeformableDetr, RTDetr, RTDetrV2, Mask2Former and OmDetTurbo."
        )
    return model


def _swap(host: nn.Module) -> int:
    """Replace a module's sampling calls; return their number, including those replaced earlier."""
    found = 0
    for name, child in list(host.named_children()):
        if type(child).__name__ == _MODULE:
            found += 1
            if not isinstance(child, MultiScaleDeformableAttention):
                setattr(host, name, MultiScaleDeformableAttention().train(child.training))
    if getattr(host, "method", "default") != "default":
        return found
    if getattr(getattr(host, _ATTRIBUTE, None), "__name__", None) in (*_FUNCTIONS, sample_points_per_level.__name__):
        setattr(host, _ATTRIBUTE, sample_points_per_level)
        return found + 1
    host_class: Any = type(host)
    code = getattr(inspect.unwrap(host_class.forward), "__code__", None)
    called = [name for name in _FUNCTIONS if code is not None and name in code.co_names]
    if called and not getattr(host_class, "_gdino_fast_attention", False):
        host.__class__ = _rebound(host_class)
    return found + len(called)


@functools.cache
def _rebound(host_class: Any) -> Any:
    """Derive a class whose forward resolves the sampling functions' names to this package's functions."""
    forward: Any = inspect.unwrap(host_class.forward)
    names = {**forward.__globals__, **_FUNCTIONS}
    # torch.compile caches by a function's code object and globals, so both must differ from the original's.
    code = forward.__code__.replace()
    ours = types.FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__

    def reduce(self: nn.Module) -> tuple[Any, ...]:
        """Pickle as transformers' original class, since pickle cannot find the derived class by name."""
        return _restore, (host_class,), self.__getstate__()

    body = {"forward": ours, "_gdino_fast_attention": True, "__doc__": host_class.__doc__, "__reduce__": reduce}
    return type(host_class.__name__, (host_class,), body)


def _restore(host_class: Any) -> nn.Module:
    """Create an empty module of the derived class, which `pickle` then fills."""
    rebound = _rebound(host_class)
    return rebound.__new__(rebound)
