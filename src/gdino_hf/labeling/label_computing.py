"""How a process that labels computes: with which products and how many threads, and what it puts back afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def same_arithmetic() -> Iterator[None]:
    """Let this process and its workers choose the arithmetic by a rule, since measurements may differ."""
    before = os.environ.get("GDINO_ARITHMETIC")
    os.environ["GDINO_ARITHMETIC"] = "fixed"
    try:
        yield
    finally:
        os.environ.pop("GDINO_ARITHMETIC")
        if before is not None:
            os.environ["GDINO_ARITHMETIC"] = before


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Let PyTorch use this number of threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
