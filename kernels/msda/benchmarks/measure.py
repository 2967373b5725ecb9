"""Timing on a GPU or CPU: medians of alternating runs, and the bandwidth of a copy."""

import statistics
import time
from collections.abc import Callable

import torch


def milliseconds(function: Callable[[], object], device: str) -> float:
    """Time one run in milliseconds; on a GPU by CUDA events."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def alternate(functions: dict[str, Callable[[], object]], device: str, repeats: int, warm_up: int = 3) -> dict:
    """Time functions alternately, so that all run at the same clock rates and temperatures.

    Args:
        functions: Functions without arguments, by name.
        device: "cpu" or a GPU device.
        repeats: Number of timed runs of each function.
        warm_up: Number of runs before timing.

    Returns:
        Median milliseconds by name; for a function that fails, the first line of its error instead.
    """
    times: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    for name, function in functions.items():
        try:
            for _ in range(warm_up):
                function()
            times[name] = []
        except Exception as error:  # a function that cannot run gets its error reported in place of a time
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    for _ in range(repeats):
        for name in times:
            times[name].append(milliseconds(functions[name], device))
    return {**{name: statistics.median(values) for name, values in times.items()}, **errors}


def copy_bandwidth(device: str, size: int = 2**30) -> float:
    """Bytes per second that a copy within the device reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    median = alternate({"copy": lambda: target.copy_(source)}, device, 10)["copy"]
    return 2 * size / median * 1e3
