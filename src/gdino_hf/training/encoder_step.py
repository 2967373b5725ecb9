"""Forward and backward of the deformable encoder layer for training on a CPU, a few hundred tokens at a time.

Autograd runs one operation after the other over all image tokens: it writes every intermediate result to memory, on
pages that the operating system hands out afresh, and reads it back. Here a block of tokens is carried through as many
operations as possible while it is in the cache, in both directions. The hidden layer of the feed-forward block, which
is eight times as wide as the tokens, is written once, and its gradient never.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..model.encoder import DeformableLayer
from ..model.ms_deform_attn import MSDeformAttn
from .plain_layers import LayerNormStep, add_product, all_plain, can_step, zeros_for
from .relu_block import ReluWeights, relu_backward, relu_forward

BLOCK = 1024
"""Tokens per block."""


class _Settings(NamedTuple):
    """What a layer's forward and backward need besides tensors."""

    heads: int
    levels: int
    points: int
    sizes: list[int]
    dropout: float
    eps: tuple[float, float]


class _Inputs(NamedTuple):
    """Tensors that a layer is called with; see `layer_step`."""

    vision: Tensor
    positions: Tensor
    references: Tensor
    mask: Tensor | None


class _Weights(NamedTuple):
    """Parameters of a layer in the order in which the autograd function takes them, or their gradients."""

    value: Tensor
    value_bias: Tensor
    offsets: Tensor
    offsets_bias: Tensor
    logits: Tensor
    logits_bias: Tensor
    output: Tensor
    output_bias: Tensor
    norm: Tensor
    norm_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor
    final: Tensor
    final_bias: Tensor

    def feed_forward(self) -> ReluWeights:
        """Return the parameters of the two layers of the feed-forward block."""
        return ReluWeights(self.fc1, self.fc1_bias, self.fc2, self.fc2_bias)


def layer_step(
    layer: DeformableLayer,
    vision: Tensor,
    position_embedding: Tensor,
    reference_points: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    vision_mask: Tensor | None,
) -> Tensor | None:
    """Compute what `DeformableLayer.forward` computes, with a backward pass of its own.

    Args:
        layer: The layer.
        vision: (B, S, D) image features.
        position_embedding: (B or 1, S, D) position embedding of the image tokens.
        reference_points: (B or 1, S, L, 2) float32 position of each image token on every level.
        spatial_shapes: (h, w) of each level.
        vision_mask: (B, S) bool, True on real tokens, or None if all are real.

    Returns:
        (B, S, D) image features, or None where this function does not apply: without gradients, in another dtype than
        float32, on another device, or if a part of the layer is not as published.
    """
    attention, training = layer.self_attn, layer.training
    linears = (
        attention.value_proj,
        attention.sampling_offsets,
        attention.attention_weights,
        attention.output_proj,
        layer.fc1,
        layer.fc2,
    )
    norms = (layer.self_attn_layer_norm, layer.final_layer_norm)
    if (
        not can_step(vision, position_embedding, *layer.parameters())
        or reference_points.requires_grad
        or type(attention) is not MSDeformAttn
        or not attention.custom_kernels
        or type(layer.activation) is not nn.ReLU
        or (training and layer.activation_dropout > 0)
        or not all_plain(linears, norms)
    ):
        return None
    value, offsets, logits, output, first, second = linears
    weights = [x for linear in (value, offsets, logits, output) for x in (linear.weight, linear.bias)]
    weights += [norms[0].weight, norms[0].bias, first.weight, first.bias, second.weight, second.bias]
    weights += [norms[1].weight, norms[1].bias]
    settings = _Settings(
        attention.num_heads,
        attention.num_levels,
        attention.num_points,
        [side for shape in spatial_shapes for side in shape],
        layer.dropout if training else 0.0,
        (norms[0].eps, norms[1].eps),
    )
    return _LayerStep.apply(settings, vision, position_embedding, reference_points, vision_mask, *weights)


class _LayerStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        vision: Tensor,
        positions: Tensor,
        references: Tensor,
        mask: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        weights = _Weights(*parameters)
        vision = vision.contiguous()
        value, locations, attention = _project(settings, _Inputs(vision, positions, references, mask), weights)
        sampled = torch.ops.gdino_hf.ms_deform_attn(value, settings.sizes, locations, attention)
        # Drawn for all tokens at once and in the order of `DeformableLayer`, so that a seed gives the same masks.
        kept = tuple(
            torch.empty_like(vision, dtype=torch.bool).bernoulli_(1 - settings.dropout)
            for _ in range(2 if settings.dropout > 0 else 0)
        )
        scale = 1 / (1 - settings.dropout) if settings.dropout < 1 else 0.0
        attended, normed, output = torch.empty_like(vision), torch.empty_like(vision), torch.empty_like(vision)
        before = LayerNormStep(weights.norm, weights.norm_bias, settings.eps[0])
        after = LayerNormStep(weights.final, weights.final_bias, settings.eps[1])
        for here in _blocks(vision):
            total = torch.addmm(weights.output_bias, sampled[here], weights.output.t(), out=attended[here])
            if kept:
                total.mul_(kept[0][here]).mul_(scale)
            normed[here], _ = before(total.add_(vision[here]))
        inner, hidden = relu_forward(normed.flatten(0, 1), weights.feed_forward())
        inner = inner.view_as(vision)
        for here in _blocks(vision):
            if kept:
                inner[here].mul_(kept[1][here]).mul_(scale)
            output[here], _ = after(inner[here].add_(normed[here]))
        ctx.settings, ctx.scale, ctx.has_mask = settings, scale, mask is not None
        ctx.save_for_backward(
            vision, positions, references, mask, value, locations, attention, sampled, attended, hidden, inner,
            *parameters, *kept,
        )  # fmt: skip
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        vision, positions, references, mask, value, locations, attention, sampled, attended, hidden, inner, *rest = (
            ctx.saved_tensors
        )
        settings, grad = ctx.settings, grad.contiguous()
        weights, kept = _Weights(*rest[: len(_Weights._fields)]), rest[len(_Weights._fields) :]
        grads = _Weights(*zeros_for(weights, ctx.needs_input_grad[5:]))
        before = LayerNormStep(weights.norm, weights.norm_bias, settings.eps[0])
        after = LayerNormStep(weights.final, weights.final_bias, settings.eps[1])
        grad_normed, branch, normed = torch.empty_like(vision), torch.empty_like(vision), torch.empty_like(vision)
        for here in _blocks(vision):
            _, statistics = after(inner[here])
            grad_normed[here] = after.backward(grad[here], inner[here], statistics, grads.final, grads.final_bias)
            torch.mul(grad_normed[here], kept[1][here] if kept else 1.0, out=branch[here]).mul_(ctx.scale)
            normed[here], _ = before(attended[here])
        grad_branch = relu_backward(
            branch.flatten(0, 1), normed.flatten(0, 1), hidden, weights.feed_forward(), grads.feed_forward()
        ).view_as(vision)
        grad_vision, grad_sampled = grad_normed, branch
        for here in _blocks(vision):
            _, statistics = before(attended[here])
            total = grad_normed[here].add_(grad_branch[here])
            residual = before.backward(total, attended[here], statistics, grads.norm, grads.norm_bias)
            grad_vision[here] = residual
            part = residual * kept[0][here] * ctx.scale if kept else residual
            add_product(grads.output, grads.output_bias, part, sampled[here])
            torch.mm(part, weights.output, out=grad_sampled[here])
        grad_value, grad_locations, grad_attention = torch.ops.gdino_hf.ms_deform_attn_backward(
            grad_sampled, value, settings.sizes, locations, attention
        )
        grad_positions = torch.zeros_like(positions)
        _project_backward(
            settings,
            _Inputs(vision, positions, references, mask),
            weights,
            (attention, grad_value, grad_locations, grad_attention),
            grads,
            grad_vision,
            grad_positions,
        )
        return None, grad_vision, grad_positions, None, None, *grads


def _blocks(x: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield the image and the rows of each block of (B, S, D) tokens."""
    for image in range(x.shape[0]):
        for start in range(0, x.shape[1], BLOCK):
            yield image, slice(start, start + BLOCK)


def _project(
    settings: _Settings,
    inputs: _Inputs,
    weights: _Weights,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values (B, S, M, Dh), sampling locations (B, S, M, L, K, 2) and attention weights (B, S, M, L, K)."""
    vision, positions, references, mask = inputs
    batch, tokens, _ = vision.shape
    grid = (settings.heads, settings.levels, settings.points)
    value = torch.empty_like(vision)
    locations, attention = vision.new_empty(batch, tokens, *grid, 2), vision.new_empty(batch, tokens, *grid)
    offsets, offsets_bias = _in_maps(settings, weights)
    # One row of points for all heads, so that the rows of a head are added in one piece.
    points = references[:, :, :, None].expand(-1, -1, -1, settings.points, -1).flatten(2)
    for image, rows in _blocks(vision):
        features = vision[image, rows]
        own = torch.addmm(weights.value_bias, features, weights.value.t(), out=value[image, rows])
        if mask is not None:
            own.masked_fill_(~mask[image, rows, None], 0.0)
        queries = features + _of(positions, image)[rows]
        places = locations[image, rows].flatten(1)
        torch.addmm(offsets_bias, queries, offsets.t(), out=places)
        places.unflatten(1, (settings.heads, -1)).add_(_of(points, image)[rows, None])
        logits = torch.addmm(weights.logits_bias, queries, weights.logits.t())
        torch.softmax(logits.unflatten(1, (settings.heads, -1)), -1, out=attention[image, rows].flatten(2))
    return value.unflatten(2, (settings.heads, -1)), locations, attention


def _in_maps(settings: _Settings, weights: _Weights) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the sampling offsets in units of each level's map instead of its cells."""
    cells = _cells(settings, weights.offsets)
    return weights.offsets / cells[:, None], weights.offsets_bias / cells


def _cells(settings: _Settings, like: Tensor) -> Tensor:
    """Return the cells of a map along the axis of each sampling offset, (M * L * K * 2,), in the dtype of `like`."""
    sizes = like.new_tensor(settings.sizes).view(1, settings.levels, 1, 2).flip(-1)
    return sizes.expand(settings.heads, -1, settings.points, -1).flatten()


def _project_backward(
    settings: _Settings,
    inputs: _Inputs,
    weights: _Weights,
    sampling: tuple[Tensor, Tensor, Tensor, Tensor],
    grads: _Weights,
    grad_vision: Tensor,
    grad_positions: Tensor,
) -> None:
    """Add the gradients that flow through the projections before the sampling to those of features and weights."""
    vision, positions, _, mask = inputs
    attention, grad_value, grad_locations, grad_attention = sampling
    grad_value = grad_value.flatten(2)
    offsets, _ = _in_maps(settings, weights)
    for image, rows in _blocks(vision):
        features = vision[image, rows]
        queries = features + _of(positions, image)[rows]
        places = grad_locations[image, rows].flatten(1)
        logits = torch.ops.aten._softmax_backward_data(
            grad_attention[image, rows].flatten(2), attention[image, rows].flatten(2), -1, attention.dtype
        ).flatten(1)
        add_product(grads.offsets, grads.offsets_bias, places, queries)
        add_product(grads.logits, grads.logits_bias, logits, queries)
        grad_queries = (places @ offsets).addmm_(logits, weights.logits)
        _of(grad_positions, image)[rows] += grad_queries
        own = grad_value[image, rows]
        if mask is not None:
            own = own.masked_fill(~mask[image, rows, None], 0.0)
        add_product(grads.value, grads.value_bias, own, features)
        grad_vision[image, rows] += grad_queries.addmm_(own, weights.value)
    cells = _cells(settings, offsets)
    for target in (grads.offsets, grads.offsets_bias):
        if target is not None:
            target.div_(cells.view(-1, *[1] * (target.ndim - 1)))


def _of(x: Tensor, image: int) -> Tensor:
    """Return the rows of an image in a tensor that may have one row for all images."""
    return x[image if x.shape[0] > 1 else 0]
