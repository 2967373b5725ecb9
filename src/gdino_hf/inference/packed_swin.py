"""transformers' Swin backbone on a CPU, computed a few windows at a time.

The stock layer writes the whole feature map to memory eight times while it pads, shifts, partitions and reverses. Here
an index of each window's tokens, cached per image size, replaces these steps (Liu et al. 2021, section 3.2). One worker
carries a few windows through attention and MLP, so their data stays in its cache.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.transformers_internals import has_known_swin_parts
from .compiled_layers import CompiledWeight, weights_for
from .packed_linear import PackedLinear, runs_packed, side_by_side, state_of
from .workers import RowBlocks, run_rows

_TOKENS = 1024  # tokens of the windows that are computed together, at most
_BLOCKS = 16  # blocks into which a small map is divided


@functools.lru_cache(maxsize=64)
def window_index(height: int, width: int, window: int, shift: int) -> tuple[Tensor, Tensor | None]:
    """Index the tokens of each window of a padded, shifted map.

    Args:
        height: Height of the map in tokens.
        width: Width of the map in tokens.
        window: Side of a window in tokens.
        shift: Cyclic shift of the windows in tokens; 0 for none.

    Returns:
        Two tensors (windows, window^2) int64: the token at each place, with height * width standing for padding, and
        the region of each place. Tokens attend to their own region only; without a shift there is one region, and the
        second tensor is None.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        rows, columns = -(-height // window) * window, -(-width // window) * window
        index = torch.full((rows, columns), height * width)
        index[:height, :width] = torch.arange(height * width).view(height, width)

        def windows(x: Tensor) -> Tensor:
            cut = x.view(rows // window, window, columns // window, window)
            return cut.transpose(1, 2).reshape(-1, window * window).contiguous()

        if shift == 0:
            return windows(index), None
        y, x = torch.arange(rows), torch.arange(columns)
        y_region = (y >= rows - window).long() + (y >= rows - shift).long()
        x_region = (x >= columns - window).long() + (x >= columns - shift).long()
        return windows(index.roll((-shift, -shift), (0, 1))), windows(y_region[:, None] * 3 + x_region)


class _Layer:
    """One Swin layer with packed weights.

    Args:
        layer: The layer of transformers' Swin.
        kind: Class of its linear layers.
    """

    def __init__(self, layer: Any, kind: type[PackedLinear] = PackedLinear) -> None:
        attention, mlp = layer.attention, layer.mlp
        self.window, self.shift = int(layer.window_size), int(layer.shift_size)
        self.heads = attention.num_attention_heads
        self.norm_before, self.norm_after = layer.layernorm_before, layer.layernorm_after
        self.qkv = side_by_side([attention.q_proj, attention.k_proj, attention.v_proj], kind)
        self.out = kind(attention.o_proj)
        self.fc1, self.fc2 = kind(mlp.fc1, "gelu"), kind(mlp.fc2)
        self.bias = attention.relative_position_bias().detach()

    def __call__(self, x: Tensor, height: int, width: int) -> Tensor:
        """Apply window attention and the MLP, each with its residual, (B, height * width, C) to the same shape."""
        batch, tokens, channels = x.shape
        index, regions = window_index(height, width, self.window, self.shift)
        x = x.contiguous()
        output = torch.empty_like(x)
        # Few large blocks suit the caches, but every worker should get several.
        windows = max(1, min(_TOKENS, batch * tokens // _BLOCKS) // index.shape[1])
        weights = weights_for(x, self.qkv, self.out, self.fc1, self.fc2) if channels == 32 * self.heads else None
        if weights is not None:
            self._compiled(x, index, regions, weights, windows, output)
            return output

        def block(image: int, part: slice) -> None:
            self._windows(x[image], index[part], None if regions is None else regions[part], output[image])

        run_rows(RowBlocks(block, batch, len(index), windows))
        return output

    def _windows(self, x: Tensor, index: Tensor, regions: Tensor | None, output: Tensor) -> None:
        """Compute some windows of one image, (tokens, C), and write their tokens to the output."""
        tokens, channels = x.shape
        places = index.flatten()
        real = places < tokens
        padded = not bool(real.all())
        # Padding is zero after normalization; any row can stand for it, since its output is not used.
        taken = x.index_select(0, places.clamp(max=tokens - 1) if padded else places)
        normed = self.norm_before(taken)
        if padded:
            normed.masked_fill_(~real[:, None], 0.0)
        query, key, value = (
            self.qkv(normed).view(*index.shape, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        )
        bias = self.bias
        if regions is not None:
            apart = regions[:, None, :] != regions[:, :, None]
            if apart.any():
                bias = bias - 100.0 * apart[:, None].to(bias.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        taken = self.out(attended.transpose(1, 2).reshape(-1, channels)).add_(taken)
        if padded:
            places, taken = places[real], taken[real]
        output.index_copy_(0, places, self.fc2(self.fc1(self.norm_after(taken))).add_(taken))

    def _compiled(
        self,
        x: Tensor,
        index: Tensor,
        regions: Tensor | None,
        weights: list[CompiledWeight],
        windows: int,
        output: Tensor,
    ) -> None:
        """Compute the layer in a C library, in two passes over the tokens."""
        qkv, out, first, second = weights
        library, (batch, tokens, _), attended = qkv.library, x.shape, torch.empty_like(x)

        def attend(image: int, part: slice) -> None:
            library.window_attention(
                x[image, None],
                index[part],
                None if regions is None else regions[part],
                self.bias,
                before=self.norm_before,
                qkv=qkv,
                project=out,
                out=attended[image, None],
            )

        def feed_forward(image: int, rows: slice) -> None:
            library.feed_forward(
                attended[image, rows], first, second, "gelu", before=self.norm_after, out=output[image, rows]
            )

        run_rows(RowBlocks(attend, batch, len(index), windows))
        run_rows(RowBlocks(feed_forward, batch, tokens, windows * index.shape[1]))


class _Merging:
    """Patch merging between two stages: 2 x 2 neighbours become one token of twice the width (Liu et al. 2021, 3.1)."""

    def __init__(self, downsample: Any, kind: type[PackedLinear] = PackedLinear) -> None:
        self.norm = downsample.norm
        self.reduction = kind(downsample.reduction)

    def __call__(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map (B, height * width, C) to (B, ceil(height / 2) * ceil(width / 2), 2C)."""
        x = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, width % 2, 0, height % 2))
        batch, height, width, _ = x.shape
        output = x.new_empty(batch, height // 2, width // 2, self.reduction.out_features)

        def block(image: int, rows: slice) -> None:
            part = x[image, 2 * rows.start : 2 * rows.stop]
            # The published weights expect the four neighbours in column-major order.
            parts = [part[row::2, column::2] for column in range(2) for row in range(2)]
            output[image, rows] = self.reduction(self.norm(torch.cat(parts, dim=-1)))

        run_rows(
            RowBlocks(block, batch, height // 2, max(1, min(_TOKENS, height * width // 4 // _BLOCKS) // (width // 2)))
        )
        return output.flatten(1, 2)


class PackedSwin:
    """A fast forward of a SwinBackbone, which falls back to the stock one where packed layers cannot run.

    Args:
        backbone: The SwinBackbone, which keeps its parameters and their names.
        kind: Class of the linear layers.
    """

    def __init__(self, backbone: Any, kind: type[PackedLinear] = PackedLinear) -> None:
        self.backbone, self.kind = backbone, kind
        self._packed: tuple[tuple, list[tuple[list[_Layer], _Merging | None]]] | None = None

    @staticmethod
    def knows(backbone: Any) -> bool:
        """Return whether this class can run a backbone.

        It can if the backbone is a SwinBackbone from a supported transformers, uses GELU and does not output its stem.
        """
        if not has_known_swin_parts(backbone) or backbone.stage_names[0] in backbone.out_features:
            return False
        layers = [layer for stage in backbone.swin.encoder.layers for layer in stage.blocks]
        return all(type(layer.mlp.activation_fn).__name__ == "GELUActivation" for layer in layers)

    def __getstate__(self) -> dict[str, Any]:
        return {"backbone": self.backbone, "kind": self.kind, "_packed": None}

    def _pack(self, encoder: Any) -> list[tuple[list[_Layer], _Merging | None]]:
        return [
            (
                [_Layer(layer, self.kind) for layer in stage.blocks],
                None if stage.downsample is None else _Merging(stage.downsample, self.kind),
            )
            for stage in encoder.layers
        ]

    def __call__(self, pixel_values: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) pixels to feature maps (B, C_l, h_l, w_l), fine to coarse, with channels last in memory."""
        swin = self.backbone.swin
        if not runs_packed(pixel_values, swin.embeddings.patch_embeddings.projection.weight):
            return list(self.backbone(pixel_values).feature_maps)
        key = state_of(*swin.encoder.parameters())
        packed = self._packed
        if packed is None or packed[0] != key:
            # Assigned in one step when complete, since another thread may be running the same model.
            packed = self._packed = (key, self._pack(swin.encoder))
        x, (height, width) = swin.embeddings(pixel_values)
        maps = []
        for name, (layers, merging) in zip(self.backbone.stage_names[1:], packed[1], strict=True):
            for layer in layers:
                x = layer(x, height, width)
            if name in self.backbone.out_features:
                normed = _by_rows(self.backbone.hidden_states_norms[name], x)
                maps.append(normed.unflatten(1, (height, width)).permute(0, 3, 1, 2))
            if merging is not None:
                x = merging(x, height, width)
                height, width = -(-height // 2), -(-width // 2)
        return maps


def _by_rows(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalize each token, (B, N, C) to the same shape."""
    output = torch.empty_like(x)

    def block(image: int, rows: slice) -> None:
        output[image, rows] = norm(x[image, rows])

    run_rows(RowBlocks(block, x.shape[0], x.shape[1], _TOKENS))
    return output
