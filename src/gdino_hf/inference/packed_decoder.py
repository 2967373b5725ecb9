"""The decoder layer on a CPU, in two passes over the queries.

The first pass projects queries, keys and values of the self-attention, and the values of all image tokens. The second
one carries each block of queries through the rest of the layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..model.attention import MultiheadAttention, attend
from ..model.decoder import DecoderLayer
from .compiled_layers import finish_layer, weights_for
from .packed_attention import PackedMSDeformAttn, rows_at_once
from .packed_linear import PackedLinear, share_state
from .workers import RowBlocks, even_rows, run_rows, thread_count

QUERIES = 128
"""Queries per block, at most: 900 queries make eight blocks."""


class PackedAttention(MultiheadAttention):
    """A MultiheadAttention that shares another one's parameters and can attend for a block of queries at a time.

    Args:
        attention: The module to replace; its parameters are shared.
        kind: Class of its linear layers.
    """

    query: PackedLinear
    key: PackedLinear
    value: PackedLinear

    def __init__(self, attention: MultiheadAttention, kind: type[PackedLinear]) -> None:
        nn.Module.__init__(self)
        share_state(self, attention)
        for name in ("query", "key", "value", "out_proj"):
            setattr(self, name, kind(getattr(attention, name)))

    def split(self, x: Tensor) -> Tensor:
        """Split heads: (B, N, D) to (B, M, N, Dh)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from projected queries (B, Q, D) to projected keys and values (B, N, D); see `forward`."""
        query, key, value = (self.split(x) for x in (query, key, value))
        return self.out_proj(attend(self, self.config, query, key, value, mask)[0])


class PackedDecoderLayer(DecoderLayer):
    """A DecoderLayer that shares another one's parameters and runs on packed weights where possible.

    Args:
        layer: The layer to replace, whose activation is ReLU; its parameters are shared.
        kind: Class of its linear layers.
    """

    self_attn: PackedAttention
    encoder_attn_text: PackedAttention
    encoder_attn: PackedMSDeformAttn

    def __init__(self, layer: DecoderLayer, kind: type[PackedLinear] = PackedLinear) -> None:
        nn.Module.__init__(self)
        share_state(self, layer)
        self.self_attn = PackedAttention(layer.self_attn, kind)
        self.encoder_attn_text = PackedAttention(layer.encoder_attn_text, kind)
        self.encoder_attn = PackedMSDeformAttn(layer.encoder_attn, kind)
        self.fc1, self.activation, self.fc2 = kind(layer.fc1, "relu"), nn.Identity(), kind(layer.fc2)

    def forward(
        self,
        queries: Tensor,
        position_embedding: Tensor,
        reference_points: Tensor,
        vision: Tensor,
        text: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        vision_mask: Tensor | None,
        text_mask: Tensor,
        query_mask: Tensor | None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Compute what `DecoderLayer.forward` computes."""
        library = None if output_attentions else self.encoder_attn.library_for(queries)
        if library is None or query_mask is not None:
            return super().forward(
                queries,
                position_embedding,
                reference_points,
                vision,
                text,
                spatial_shapes,
                vision_mask,
                text_mask,
                query_mask,
                output_attentions,
            )
        own = self.self_attn
        query, key, value, values = self._project(queries, position_embedding, vision, vision_mask)
        text_key, text_value = self.encoder_attn_text.key(text), self.encoder_attn_text.value(text)
        joint = self.encoder_attn.joint_projection()
        output = torch.empty_like(query)

        def block(here: slice, rows: slice) -> None:
            position = position_embedding[here, rows]
            x = self.self_attn_layer_norm(queries[here, rows] + own.attend(query[here, rows], key[here], value[here]))
            asked = self.encoder_attn_text.query(x + position)
            mask = text_mask[here, None, None, :]
            attended = self.encoder_attn_text.attend(asked, text_key[here], text_value[here], mask)
            x = self.encoder_attn_text_layer_norm(x + attended)
            references = reference_points[here, rows]
            sampled = self.encoder_attn.sample(library, joint(x + position), values[here], references, spatial_shapes)
            self._finish(x.flatten(0, 1), sampled.flatten(0, 1), output[here, rows].flatten(0, 1))

        batch, number = queries.shape[:2]
        if number <= QUERIES and thread_count() == 1:
            # Few operations on the queries of all images take less time than many on those of one.
            block(slice(0, batch), slice(0, number))
        else:
            size = even_rows(number, QUERIES)
            run_rows(RowBlocks(lambda image, rows: block(slice(image, image + 1), rows), batch, number, size))
        return output, None

    def _project(
        self, queries: Tensor, positions: Tensor, vision: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries, keys and values of the self-attention, (B, Q, D), and the image's values, (B, S, D)."""
        own = self.self_attn
        shape = queries.shape
        # These are computed row by row, so it makes no difference which image a row belongs to.
        queries, positions, vision = (x.reshape(1, -1, x.shape[-1]) for x in (queries, positions, vision))
        mask = None if mask is None else mask.reshape(1, -1)
        query, key, value = (queries.new_empty(queries.shape) for _ in range(3))
        values = torch.empty_like(vision)

        write_query, write_key, write_value = (x.writer(queries) for x in (own.query, own.key, own.value))
        of_image = self.encoder_attn.value_block(vision, mask, values)

        def of_queries(image: int, rows: slice) -> None:
            content, position = queries[image, rows], positions[image, rows]
            write_query(query[image, rows], content, position)
            write_key(key[image, rows], content, position)
            write_value(value[image, rows], content)

        run_rows(
            RowBlocks(of_image, 1, vision.shape[1], rows_at_once(*vision.shape[1:])),
            RowBlocks(of_queries, 1, queries.shape[1], even_rows(queries.shape[1], QUERIES)),
        )
        query, key, value = (x.view(shape) for x in (query, key, value))
        return query, key, value, values.view(shape[0], -1, values.shape[-1])

    def _finish(self, queries: Tensor, sampled: Tensor, output: Tensor) -> None:
        """Write what follows the sampling for a block of queries, (N, D), to the output."""
        weights = weights_for(queries, self.fc1, self.fc2, self.encoder_attn.output_proj)
        if weights is None:
            x = self.encoder_attn_layer_norm(queries + self.encoder_attn.output_proj(sampled))
            output.copy_(self.final_layer_norm(x + self.fc2(self.fc1(x))))
            return
        finish_layer(queries, sampled, weights, self.encoder_attn_layer_norm, self.final_layer_norm, output)
