"""Language-guided query selection: the image tokens most similar to the text become queries (Liu et al. 2023, 3.2)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class SelectedQueries:
    """The image tokens that become queries of the decoder.

    Attributes:
        features: (B, Q, D) normalized encoder features of the selected tokens, with gradient.
        logits: (B, Q, T) token logits of the selected tokens.
        box_logits: (B, Q, 4) float32 boxes of the selected tokens before the sigmoid, with gradient.
        all_logits: (B, S', T) token logits of all image tokens; S' is the larger of S and Q.
        all_box_logits: (B, S', 4) float32 boxes of all image tokens before the sigmoid; None unless asked for.
    """

    features: Tensor
    logits: Tensor
    box_logits: Tensor
    all_logits: Tensor
    all_box_logits: Tensor | None


def select_queries(
    vision: Tensor,
    vision_mask: Tensor,
    proposals: Tensor,
    valid: Tensor,
    num_queries: int,
    project: Callable[[Tensor], Tensor],
    class_head: Callable[[Tensor], Tensor],
    box_head: Callable[[Tensor], Tensor],
    all_boxes: bool = False,
) -> SelectedQueries:
    """Select the num_queries image tokens whose highest token logit is largest (Liu et al. 2023, equation 1).

    I = top_Q( max over text tokens of X_I X_T^T ), with the class head as the similarity of X_I (image) and X_T (text)

    An image with fewer tokens than queries is filled up with empty tokens, so Q does not depend on the image. Padding
    is selected only if there are no real tokens left, so an image gives the same queries alone and in a batch.

    Args:
        vision: (B, S, D) encoder output.
        vision_mask: (B, S) bool, True on real tokens.
        proposals: (B, S, 4) float32 cxcywh before the sigmoid.
        valid: (B, S) bool, True where a token has a proposal.
        num_queries: Number of queries Q.
        project: Output projection and normalization of the encoder's features, (B, S, D) to (B, S, D).
        class_head: Similarity to the text, (B, S, D) to (B, S, T) logits.
        box_head: Box regression, (B, S, D) to (B, S, 4) deltas before the sigmoid.
        all_boxes: Whether to compute the boxes of all tokens instead of the selected ones only.

    Returns:
        The selected queries, best first.
    """
    # A graph for every image size cannot ask whether tokens are missing, so an exported one is always filled up.
    missing = num_queries if torch.compiler.is_exporting() else max(0, num_queries - vision.shape[1])
    if missing > 0:
        vision = F.pad(vision, (0, 0, 0, missing))
        proposals = F.pad(proposals, (0, 0, 0, missing), value=torch.inf)
        valid = F.pad(valid, (0, missing))
        vision_mask = F.pad(vision_mask, (0, missing))
    features = project(vision.masked_fill(~valid[..., None], 0.0))
    logits = class_head(features)
    best = logits.amax(-1).masked_fill(~vision_mask, -torch.inf)
    index = best.topk(num_queries, dim=1).indices[..., None]

    def take(x: Tensor) -> Tensor:
        return x.gather(1, index.expand(-1, -1, x.shape[-1]))

    if all_boxes:
        boxes = box_head(features).float() + proposals
        return SelectedQueries(take(features), take(logits), take(boxes), logits, boxes)
    selected = take(features)
    return SelectedQueries(selected, take(logits), box_head(selected).float() + take(proposals), logits, None)
