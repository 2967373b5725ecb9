"""Image-text fusion on a CPU, in one pass over the image tokens.

The softmax over the image tokens is computed block by block: each block is weighted by exp(score - its largest score),
and at the end the blocks' sums are brought to one common maximum (Milakov and Gimelshein 2018, arXiv:1805.02867).
"""

import torch
from torch import Tensor, nn

from ..model.fusion import FusionLayer, FusionWeights, is_plain, mix
from .float_linear import FloatLibrary, FloatLinear, FloatWeight, load
from .packed_attention import BLOCK
from .packed_linear import PackedLinear, runs_packed, share_state
from .workers import RowBlocks, even_rows, run_rows

# Each block has sums of its own, which are joined at the end. So a batch with enough blocks for many threads has longer
# ones, up to this number of values. Their number decides how sums are rounded, so it is the same for any threads.
_BLOCKS, _VALUES = 8, 131072


class PackedFusionLayer(FusionLayer):
    """A FusionLayer that shares another one's parameters and runs block by block where possible.

    Args:
        layer: The layer to replace; its parameters are shared.
        kind: Class of the model's linear layers; with FloatLinear, the image side runs in the C library.
    """

    def __init__(self, layer: FusionLayer, kind: type[PackedLinear] = PackedLinear) -> None:
        nn.Module.__init__(self)
        share_state(self, layer)
        self._kind = kind

    def forward(
        self,
        vision: Tensor,
        text: Tensor,
        vision_mask: Tensor | None,
        text_mask: Tensor,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor, FusionWeights | None]:
        """Compute what `FusionLayer.forward` computes."""
        attention = self.attn
        projections = (attention.vision_proj, attention.values_vision_proj, attention.out_vision_proj)
        if (
            output_attentions
            or self.training
            or not runs_packed(vision, projections[0].weight)
            or not all(is_plain(projection) for projection in projections)
        ):
            return super().forward(vision, text, vision_mask, text_mask, output_attentions)
        text = self.layer_norm_text(text)
        vision, pooled = self._image_side(vision, text, vision_mask, text_mask)
        to_text = attention.unfold(pooled)
        if self.kind == "gated":
            return vision, mix(self.gate_text, text, to_text), None
        return vision, torch.addcmul(text, self.text_param, to_text), None

    def _image_side(
        self, vision: Tensor, text: Tensor, vision_mask: Tensor | None, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the fused image features (B, S, D) and what each head's text tokens pool from them, (B, M * T, D)."""
        attention, batch, (tokens, width) = self.attn, len(vision), vision.shape[1:]
        directions, offsets, brought = attention.fold(text)
        columns = directions.shape[1]
        size = even_rows(tokens, max(BLOCK, min(batch * tokens // _BLOCKS, _VALUES // width)))
        blocks = -(-tokens // size)
        vision = vision.contiguous()
        output = torch.empty_like(vision)
        peaks, sums = (vision.new_empty(batch, blocks, columns, 1, dtype=torch.float32) for _ in range(2))
        pooled = vision.new_empty(batch, blocks, columns, width, dtype=torch.float32)
        lowest = torch.finfo(vision.dtype).min

        def in_torch(image: int, rows: slice) -> None:
            features = self.layer_norm_vision(vision[image, rows])
            scores = torch.addmm(offsets[image], directions[image], features.t())
            by_head = scores.view(attention.num_heads, -1, scores.shape[1])
            over_text = by_head.masked_fill(~text_mask[image, None, :, None], lowest).softmax(1).flatten(0, 1)
            to_vision = torch.addmm(attention.out_vision_proj.bias, over_text.t(), brought[image])
            if self.kind == "gated":
                output[image, rows] = mix(self.gate_vision, features, to_vision)
            else:
                output[image, rows] = torch.addcmul(features, self.vision_param, to_vision)
            if vision_mask is not None:
                scores = scores.masked_fill(~vision_mask[image, rows], lowest)
            here = image, rows.start // size
            peaks[here] = peak = scores.amax(1, keepdim=True)
            weights = (scores - peak).exp_()
            sums[here] = weights.sum(1, keepdim=True, dtype=torch.float32)
            pooled[here] = weights @ features

        library = self._library_for(vision, text_mask)
        if library is None:
            run_rows(RowBlocks(in_torch, batch, tokens, size))
        else:
            real = None if vision_mask is None else vision_mask.contiguous()
            # The layer scale is applied to the few values of the text instead of the many image tokens.
            scaled = (brought * self.vision_param).transpose(1, 2)
            bias = attention.out_vision_proj.bias * self.vision_param
            texts = [
                (FloatWeight(library, directions[i], offsets[i, :, 0]), mask, FloatWeight(library, scaled[i], bias))
                for i, mask in enumerate(text_mask.float())
            ]

            def in_library(image: int, rows: slice) -> None:
                number = rows.start // size
                to_scores, mask, to_features = texts[image]
                to_scores.library.fuse(
                    vision[image, rows],
                    self.layer_norm_vision,
                    to_scores,
                    mask,
                    to_features,
                    None if real is None else real[image, rows],
                    out=output[image, rows],
                    peaks=peaks[image, number],
                    sums=sums[image, number],
                    pooled=pooled[image, number],
                )

            run_rows(RowBlocks(in_library, batch, tokens, size))
        scale = (peaks - peaks.amax(1, keepdim=True)).exp_()
        joined = (pooled * scale).sum(1) / (sums * scale).sum(1)
        return output, joined.to(vision.dtype)

    def _library_for(self, vision: Tensor, text_mask: Tensor) -> FloatLibrary | None:
        """Return the C library if it computes this layer for these inputs, else None."""
        fits = self._kind is FloatLinear and self.kind == "bi_attention" and vision.dtype == torch.float32
        # With no real text token at all, softmax spreads evenly over the masked ones, which the library does not do.
        return load() if fits and bool(text_mask.any(-1).all()) else None
