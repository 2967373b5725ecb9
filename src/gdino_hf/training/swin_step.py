"""Forward and backward of transformers' Swin backbone for training on a CPU, a few windows at a time.

The stock layer pads, shifts, partitions and reverses the whole map with a copy each, and its attention keeps the scores
of all windows several times over, since the position bias needs a gradient. Here an index of each window's tokens
replaces the copies (Liu et al. 2021, section 3.2), and a few windows are carried through as many operations as possible
while they are in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..inference.packed_swin import PackedSwin, window_index
from .plain_layers import LayerNormStep, add_product, all_plain, can_step, zeros_for

_TOKENS = 1024  # tokens of the windows that are computed together, at most


class _Windows(NamedTuple):
    """Where the windows of a batch of maps lie.

    Attributes:
        shape: Number of windows W and of places N in each.
        tokens: (R,) int64 the batch's tokens in the order of the windows.
        inside: (R,) int64 place of each of these tokens among the W * N places; None if there is no padding.
        apart: (W, 1, N, N) float32, -100 between regions that a shift brought together and 0 elsewhere; None without
            a shift.
        starts: For each window, the number of tokens in the windows before it, and the total.
    """

    shape: tuple[int, int]
    tokens: Tensor
    inside: Tensor | None
    apart: Tensor | None
    starts: list[int]


@functools.lru_cache(maxsize=64)
def _windows(batch: int, height: int, width: int, window: int, shift: int) -> _Windows:
    index, regions = window_index(height, width, window, shift)
    tokens = height * width
    is_real = (index < tokens).repeat(batch, 1)
    first = torch.arange(batch).repeat_interleave(len(index))[:, None] * tokens
    places = (index.repeat(batch, 1) + first)[is_real]
    apart = None
    if regions is not None:
        apart = -100.0 * (regions[:, None, :] != regions[:, :, None])[:, None].float().repeat(batch, 1, 1, 1)
    starts = [0, *is_real.sum(1).cumsum(0).tolist()]
    inside = None if bool(is_real.all()) else is_real.flatten().nonzero()[:, 0]
    return _Windows((len(is_real), is_real.shape[1]), places, inside, apart, starts)


class _Weights(NamedTuple):
    """Parameters of a layer in the order in which the autograd function takes them, or their gradients."""

    bias: Tensor
    before: Tensor
    before_bias: Tensor
    query: Tensor
    query_bias: Tensor
    key: Tensor
    key_bias: Tensor
    value: Tensor
    value_bias: Tensor
    output: Tensor
    output_bias: Tensor
    after: Tensor
    after_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor

    def qkv(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the three projections side by side."""
        return torch.cat((self.query, self.key, self.value)), torch.cat(
            (self.query_bias, self.key_bias, self.value_bias)
        )


class _Settings(NamedTuple):
    """What a layer's forward and backward need besides tensors."""

    heads: int
    eps: tuple[float, float]
    windows: _Windows


class SwinStep:
    """A forward of a SwinBackbone for training, which falls back to the stock one where it does not apply.

    Args:
        backbone: The SwinBackbone, which keeps its parameters and their names.
    """

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone

    @staticmethod
    def knows(backbone: Any) -> bool:
        """Return whether this class can run a backbone."""
        return PackedSwin.knows(backbone)

    def __call__(self, pixel_values: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) pixels to feature maps (B, C_l, h_l, w_l), fine to coarse."""
        backbone = self.backbone
        swin = backbone.swin
        blocks = [layer for stage in swin.encoder.layers for layer in stage.blocks]
        if not can_step(pixel_values, *backbone.parameters()) or not all(_is_plain_block(x) for x in blocks):
            return list(backbone(pixel_values).feature_maps)
        x, (height, width) = swin.embeddings(pixel_values)
        maps = []
        for name, stage in zip(backbone.stage_names[1:], swin.encoder.layers, strict=True):
            for layer in stage.blocks:
                x = block_step(layer, x, height, width)
            if name in backbone.out_features:
                normed = backbone.hidden_states_norms[name](x)
                maps.append(normed.unflatten(1, (height, width)).permute(0, 3, 1, 2).contiguous())
            if stage.downsample is not None:
                x = stage.downsample(x, (height, width))
                height, width = -(-height // 2), -(-width // 2)
        return maps


def _is_plain_block(layer: Any) -> bool:
    attention, mlp = layer.attention, layer.mlp
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.fc1, mlp.fc2)
    drops = (layer.dropout.p, attention.attention_dropout) if layer.training else (0.0,)
    return (
        all_plain(linears, (layer.layernorm_before, layer.layernorm_after))
        and not any(drops)
        and not layer.gradient_checkpointing
    )


def block_step(layer: Any, x: Tensor, height: int, width: int) -> Tensor:
    """Compute what a SwinLayer computes, with a backward pass of its own.

    Args:
        layer: The SwinLayer, without dropout; its drop path is kept.
        x: (B, height * width, C) tokens.
        height: Height of the map in tokens.
        width: Width of the map in tokens.

    Returns:
        (B, height * width, C) tokens.
    """
    attention, mlp, batch = layer.attention, layer.mlp, x.shape[0]
    before, after = layer.layernorm_before, layer.layernorm_after
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    weights = [attention.relative_position_bias()[0], before.weight, before.bias]
    weights += [y for linear in linears for y in (linear.weight, linear.bias)]
    weights += [after.weight, after.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias]
    windows = _windows(batch, height, width, int(layer.window_size), int(layer.shift_size))
    # The stock module draws which samples to drop; it returns its input unless it drops.
    ones = x.new_ones(batch, 1, 1)
    factor = layer.drop_path(ones)
    settings = _Settings(attention.num_attention_heads, (before.eps, after.eps), windows)
    return _BlockStep.apply(settings, x, None if factor is ones else factor.flatten(), *weights)


class _BlockStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: _Settings, x: Tensor, factor: Tensor | None, *parameters: Tensor) -> Tensor:
        weights, windows = _Weights(*parameters), settings.windows
        _, tokens, channels = x.shape
        rows, (total, count), heads = x.contiguous().view(-1, channels), windows.shape, settings.heads
        grid = (total, heads, count, channels // heads)
        qkv, shares = x.new_empty(3, *grid), x.new_empty(total, heads, count, count)
        mixed, middle, output = torch.empty_like(rows), torch.empty_like(rows), torch.empty_like(rows)
        hidden = x.new_empty(len(rows), len(weights.fc1))
        weight, bias = weights.qkv()
        before = LayerNormStep(weights.before, weights.before_bias, settings.eps[0])
        after = LayerNormStep(weights.after, weights.after_bias, settings.eps[1])
        for some, kept, inside in _chunks(windows):
            places = windows.tokens[kept]
            own = rows.index_select(0, places)
            projected = torch.addmm(bias, before(own)[0], weight.t())
            if inside is not None:
                # Padding is zero after the normalization.
                padded = bias.repeat((some.stop - some.start) * count, 1)
                projected = padded.index_copy_(0, inside, projected)
            parts = projected.view(-1, count, 3, heads, grid[3]).permute(2, 0, 3, 1, 4)
            query, key, value = qkv[:, some].copy_(parts)
            scores = query @ key.transpose(2, 3)
            scores.mul_(grid[3] ** -0.5).add_(weights.bias)
            if windows.apart is not None:
                scores.add_(windows.apart[some])
            share = torch.softmax(scores, -1, out=shares[some])
            gathered = (share @ value).transpose(1, 2).flatten(0, 1).flatten(1)
            mixed[kept] = gathered if inside is None else gathered.index_select(0, inside)
            attended = torch.addmm(weights.output_bias, mixed[kept], weights.output.t(), out=middle[kept])
            if factor is not None:
                attended.mul_(_per_row(factor, places, tokens))
            attended.add_(own)
            inner = torch.addmm(weights.fc1_bias, after(attended)[0], weights.fc1.t(), out=hidden[kept])
            result = torch.addmm(attended, F.gelu(inner), weights.fc2.t())
            output.index_copy_(0, places, result.add_(weights.fc2_bias))
        ctx.settings = settings
        ctx.save_for_backward(x, factor, qkv, shares, mixed, middle, hidden, *parameters)
        return output.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factor, qkv, shares, mixed, middle, hidden, *parameters = ctx.saved_tensors
        settings, weights = ctx.settings, _Weights(*parameters)
        windows, (_, tokens, channels) = settings.windows, x.shape
        rows, grad = x.contiguous().view(-1, channels), grad.contiguous().view(-1, channels)
        grads = _Weights(*zeros_for(weights, ctx.needs_input_grad[3:]))
        grad_x, (weight, _) = torch.empty_like(rows), weights.qkv()
        grad_weight, grad_bias = torch.zeros_like(weight), weight.new_zeros(len(weight))
        before = LayerNormStep(weights.before, weights.before_bias, settings.eps[0])
        after = LayerNormStep(weights.after, weights.after_bias, settings.eps[1])
        for some, kept, inside in _chunks(windows):
            places = windows.tokens[kept]
            grad_output = grad.index_select(0, places)
            add_product(grads.fc2, grads.fc2_bias, grad_output, F.gelu(hidden[kept]))
            grad_inner = torch.ops.aten.gelu_backward(grad_output @ weights.fc2, hidden[kept])
            normed, statistics = after(middle[kept])
            add_product(grads.fc1, grads.fc1_bias, grad_inner, normed)
            grad_normed = grad_inner @ weights.fc1
            residual = after.backward(grad_normed, middle[kept], statistics, grads.after, grads.after_bias)
            residual.add_(grad_output)
            branch = residual if factor is None else residual * _per_row(factor, places, tokens)
            add_product(grads.output, grads.output_bias, branch, mixed[kept])
            grad_mixed = branch @ weights.output
            if inside is not None:
                padded = grad_mixed.new_zeros((some.stop - some.start) * windows.shape[1], channels)
                grad_mixed = padded.index_copy_(0, inside, grad_mixed)
            projected = _attention_backward(grad_mixed, qkv[:, some], shares[some], grads.bias)
            grad_bias += projected.sum(0)
            if inside is not None:
                projected = projected.index_select(0, inside)
            own = rows.index_select(0, places)
            normed, statistics = before(own)
            add_product(grad_weight, None, projected, normed)
            grad_own = before.backward(projected @ weight, own, statistics, grads.before, grads.before_bias)
            grad_x.index_copy_(0, places, grad_own.add_(residual))
        targets = (grads.query, grads.key, grads.value, grads.query_bias, grads.key_bias, grads.value_bias)
        for target, value in zip(targets, (*grad_weight.chunk(3), *grad_bias.chunk(3)), strict=True):
            if target is not None:
                target.copy_(value)
        return None, grad_x.view_as(x), None, *grads


def _attention_backward(grad: Tensor, qkv: Tensor, share: Tensor, grad_bias: Tensor | None) -> Tensor:
    """Return the gradient of the projections (R, 3C) of some windows, and add that of the position bias in place.

    Args:
        grad: (R, C) gradient of the attended values, heads side by side.
        qkv: (3, W, M, N, Dh) queries, keys and values of W windows of N tokens.
        share: (W, M, N, N) attention weights.
        grad_bias: (M, N, N) gradient of the position bias to add to; None if it is frozen.
    """
    query, key, value = qkv
    windows, heads, count, width = query.shape
    grad = grad.view(windows, count, heads, width).transpose(1, 2).contiguous()
    grad_scores = torch.ops.aten._softmax_backward_data(grad @ value.transpose(2, 3), share, -1, grad.dtype)
    if grad_bias is not None:
        grad_bias += grad_scores.sum(0)
    scale = width**-0.5
    result = grad.new_empty(windows, count, 3, heads, width)
    into = result.permute(2, 0, 3, 1, 4)
    into[0] = (grad_scores @ key).mul_(scale)
    into[1] = (grad_scores.transpose(2, 3) @ query).mul_(scale)
    into[2] = share.transpose(2, 3) @ grad
    return result.view(windows * count, -1)


def _chunks(windows: _Windows) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Yield slices of windows and of their tokens, and the tokens' places in these windows, None if all are taken."""
    total, count = windows.shape
    size = max(1, _TOKENS // count)
    for start in range(0, total, size):
        some = slice(start, min(start + size, total))
        kept = slice(windows.starts[some.start], windows.starts[some.stop])
        inside = None
        if windows.inside is not None and kept.stop - kept.start < (some.stop - some.start) * count:
            inside = windows.inside[kept] - start * count
        yield some, kept, inside


def _per_row(factor: Tensor, places: Tensor, tokens: int) -> Tensor:
    """Return each row's (R, 1) factor of its sample's branch."""
    return factor[places // tokens][:, None]
