"""Batches of small pictures side by side on a CPU: each lane runs the whole model on a batch of its own.

Divided among all threads, the forward of a small picture spends much of its time in operations that only one thread
computes. With a batch per thread, these run side by side, too. Large pictures keep all threads busy, and each needs
much memory, so they go one batch after the other with all threads.
"""

import threading
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, TypeVar

import torch

from ..inference.workers import can_split, one_thread, thread_count
from .stages import in_order

Batch = TypeVar("Batch")
Result = TypeVar("Result")

_MOST_LANES = 4
"""Lanes beyond this number would mostly wait for Python's lock, which a forward holds for an eighth of its time."""
_SMALL_MODEL = 20_000_000
"""Parameters of a small model, at most, without the text backbone: gdino-nano has 7 million, Grounding DINO-T 63."""


def count_lanes(model: Any) -> int:
    """Return in how many lanes batches of small pictures are computed here: 1 if the caller's thread does it alone.

    There are several for a small optimized model on a CPU, if this thread may use several threads. Under autocast and
    with another default device there is one, because other threads would not know of these modes.

    Args:
        model: A `GDinoForObjectDetection`.
    """
    if (
        not model._optimized
        or model.device.type != "cpu"
        or torch.is_autocast_enabled("cpu")
        or torch.get_default_device().type != "cpu"
        or not can_split()
    ):
        return 1
    of_text = sum(x.numel() for x in model.base_model.text_backbone.parameters())
    if sum(x.numel() for x in model.parameters()) - of_text > _SMALL_MODEL:
        return 1
    return min(thread_count(), _MOST_LANES)


def in_lanes(
    model: Any,
    function: Callable[[Batch], Result],
    batches: Generator[Batch, None, None],
    is_small: Callable[[Batch], bool],
) -> Generator[Result, None, None]:
    """Call a function that runs a model with one batch after the other, and yield the results in their order.

    Args:
        model: The `GDinoForObjectDetection` that the function runs.
        function: Called with a batch, in the caller's thread if there is one lane, or else in other threads.
        batches: The batches, which are pulled when they are needed.
        is_small: Tells whether a batch may run beside others, with its lane's share of the threads. Other batches run
            one at a time with all of them.

    Yields:
        The function's results.

    Raises:
        Exception: What the function or the source of the batches raised, after the results of all earlier batches.
    """
    lanes = count_lanes(model)
    if lanes == 1:
        with closing(batches):
            yield from map(function, batches)
        return
    threads, alone = thread_count(), threading.Lock()

    def run(batch: Batch) -> Result:
        if is_small(batch):
            with one_thread(threads // lanes):
                return function(batch)
        with alone, one_thread(threads):
            return function(batch)

    # A lane that is ahead of its neighbour takes up to two further batches.
    with closing(in_order(run, batches, threads=lanes, ahead=lanes + 2)) as results:
        yield from results
