"""Deformable attention on a CPU: one linear layer for offsets and logits, everything else inside one C call."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..model.ms_deform_attn import MSDeformAttn
from ..model.msda_backends import requested_backend
from ..model.msda_c import CpuLibrary, load
from .packed_linear import PackedLinear, runs_packed, share_state, side_by_side, state_of
from .workers import RowBlocks, even_rows, run_rows, thread_count

BLOCK = 256
"""Tokens that one worker computes at a time, at most, if several share the work."""
_ALONE = 131072
"""Values of the tokens that a thread computes at a time if it is alone: more would leave its cache."""


def rows_at_once(rows: int, width: int) -> int:
    """Return how many rows of `width` values a block has in layers whose results do not depend on that."""
    return even_rows(rows, BLOCK if thread_count() > 1 else max(BLOCK, _ALONE // width))


class PackedMSDeformAttn(MSDeformAttn):
    """An MSDeformAttn that shares another one's parameters and runs in the C kernels where possible.

    Args:
        attention: The module to replace; its parameters are shared.
        kind: Class of its linear layers.
    """

    value_proj: PackedLinear
    output_proj: PackedLinear

    def __init__(self, attention: MSDeformAttn, kind: type[PackedLinear] = PackedLinear) -> None:
        nn.Module.__init__(self)
        share_state(self, attention)
        self._kind = kind
        self.value_proj, self.output_proj = kind(attention.value_proj), kind(attention.output_proj)
        self._joint: tuple[tuple, Any] | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_joint": None}

    def library_for(self, x: Tensor) -> CpuLibrary | None:
        """Return the C kernels if they may run on queries or values like x, else None."""
        may_run = runs_packed(x, self.value_proj.weight) and requested_backend() in ("auto", "c")
        return load() if may_run else None

    def forward(
        self,
        queries: Tensor,
        values: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        value_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what `MSDeformAttn.forward` computes."""
        library = None if output_attentions else self.library_for(queries)
        if library is None:
            return super().forward(queries, values, reference_points, spatial_shapes, value_mask, output_attentions)
        projected = self.joint_projection()(queries)
        values = self.all_values(values, value_mask)
        return self.output_proj(self.sample(library, projected, values, reference_points, spatial_shapes)), None

    def all_values(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Project the features (B, S, D) of all image tokens; `mask` is (B, S) bool, True on real tokens, or None."""
        values = features.new_empty(*features.shape[:2], self.value_proj.out_features)
        block = self.value_block(features, mask, values)
        run_rows(RowBlocks(block, features.shape[0], features.shape[1], rows_at_once(*features.shape[1:])))
        return values

    def value_block(self, features: Tensor, mask: Tensor | None, output: Tensor) -> Callable[[int, slice], None]:
        """Return a function that writes the values of some rows of an image.

        Args:
            features: (B, S, D) features of all image tokens.
            mask: (B, S) bool, True on real tokens; padded tokens become zero. None if all are real.
            output: Contiguous (B, S, D) that takes the values.
        """
        write = self.value_proj.writer(features)

        def block(image: int, rows: slice) -> None:
            write(output[image, rows], features[image, rows])
            if mask is not None:
                output[image, rows].masked_fill_(~mask[image, rows, None], 0.0)

        return block

    def sample(
        self,
        library: CpuLibrary,
        projected: Tensor,
        values: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Sample and sum the values, without the output projection.

        Args:
            library: The C kernels that `library_for` returned.
            projected: (B, Q, 3 * M * L * K) output of `joint_projection` for the queries.
            values: (B, S, D) values of all levels, one level after the other, see `all_values`.
            reference_points: (B or 1, Q, L, 2) points or (B or 1, Q, L, 4) cxcywh boxes.
            spatial_shapes: (height, width) of each level.

        Returns:
            (B, Q, D) sums, heads side by side.
        """
        sides = [side for shape in spatial_shapes for side in shape]
        heads = values.unflatten(-1, (self.num_heads, -1))
        return library.forward_projected(heads, sides, projected, reference_points, self.num_points)

    def joint_projection(self) -> Any:
        """Return the layers of offsets and attention weights joined into one, rebuilt when either has changed."""
        parts = (self.sampling_offsets, self.attention_weights)
        key = state_of(*(x for part in parts for x in (part.weight, part.bias)))
        if self._joint is None or self._joint[0] != key:
            # Inside a tuple the joint layer is not registered, so state_dict does not list its weights.
            self._joint = (key, side_by_side(parts, self._kind))
        return self._joint[1]
