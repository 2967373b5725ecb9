"""Token-wise computation in blocks of a few hundred tokens, so that intermediate results stay in the CPU's cache.

For an 800-pixel image, the hidden layer of a feed-forward block takes 150 MB. Writing it to memory and reading it back,
on pages that the operating system hands out afresh each time, costs as much as a third of the arithmetic.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 512
"""Number of tokens per block; at 2048 channels in float32, a block is 4 MB."""


def run_in_order(function: Callable[[int], None], blocks: int) -> None:
    """Call `function(0)` to `function(blocks - 1)`."""
    for block in range(blocks):
        function(block)


run = run_in_order
"""Runs the blocks. `gdino_hf.inference`, which this folder does not know, puts its workers here."""


def by_blocks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply a token-wise function block by block.

    With autograd, a compiler or a GPU, blocks would not help, so the function is called once on all tokens.

    Args:
        function: A function of the given tensors that computes each token independently and returns a tensor with the
            shape and dtype of the first one.
        tensors: Inputs (..., N, C_i) with equal leading dimensions.

    Returns:
        (..., N, C_0) result for all tokens.
    """
    first = tensors[0]
    tokens = first.shape[:-1].numel() if not torch.compiler.is_compiling() else 0
    if tokens <= BLOCK or torch.is_grad_enabled() or first.device.type != "cpu" or torch.jit.is_tracing():
        return function(*tensors)
    rows = [x.reshape(tokens, x.shape[-1]) for x in tensors]
    output = torch.empty_like(rows[0])

    def block(number: int) -> None:
        part = slice(number * BLOCK, (number + 1) * BLOCK)
        output[part] = function(*(x[part] for x in rows))

    run(block, -(-tokens // BLOCK))
    return output.view(first.shape)
