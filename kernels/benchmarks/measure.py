"""Timing on a GPU or CPU: medians of alternating runs, the bandwidth of a copy, and rows of results within a budget."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def in_one_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def alternate(
    functions: dict[str, Callable[[], object]],
    device: str,
    repeats: int,
    warm_up: int = 3,
    seconds: float = float("inf"),
) -> dict[str, Any]:
    """Time functions alternately, so that all run at the same clock rates and temperatures.

    Args:
        functions: Functions without arguments, by name.
        device: "cpu" or a GPU device.
        repeats: Number of timed runs of each function.
        warm_up: Number of runs before timing.
        seconds: Time after which no further round of runs starts; the first always runs.

    Returns:
        Median milliseconds by name; for a function that fails, the first line of its error instead.
    """
    times: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    stop = time.monotonic() + seconds
    for name, function in functions.items():
        try:
            for _ in range(warm_up):
                function()
            if device != "cpu":
                torch.cuda.synchronize()
            times[name] = []
        except Exception as error:  # a function that cannot run gets its error reported in place of a time
            errors[name] = in_one_line(error)
    for index in range(repeats):
        if index > 0 and time.monotonic() > stop:
            break
        for name in [name for name in times if name not in errors]:
            try:
                times[name].append(milliseconds(functions[name], device))
            except Exception as error:
                errors[name] = in_one_line(error)
    return {**{name: statistics.median(values) for name, values in times.items() if values}, **errors}


def copy_bandwidth(device: str, size: int = 2**30) -> float:
    """Bytes per second that a copy within the device reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    median = alternate({"copy": lambda: target.copy_(source)}, device, 10)["copy"]
    return 2 * size / median * 1e3


class Rows:
    """Results of one part of the benchmark, written line by line, so that a crash or a timeout loses only the last.

    Args:
        file: File to which each row is appended as a line of JSON.
        part: Name of the part.
        seconds: Time that the part may take.
    """

    def __init__(self, file: Path, part: str, seconds: float) -> None:
        self.file, self.part, self.end = file, part, time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def add(self, name: str, needs: float, compute: Callable[[], dict[str, Any]]) -> None:
        """Compute a row and write it, or the reason why there is none.

        Args:
            name: Name of the row.
            needs: Seconds that must be left to begin.
            compute: Function that returns the row's entries.
        """
        row: dict[str, Any] = {"part": self.part, "name": name}
        if self.left() < needs:
            row["skipped"] = f"it needs about {needs:.0f} s, and {max(self.left(), 0):.0f} s are left"
        else:
            try:
                row |= compute()
            except Exception as error:  # the other rows must still be measured
                row["failed"] = in_one_line(error)
        if torch.cuda.is_available():
            try:
                torch.cuda.empty_cache()
            except RuntimeError as error:  # after an illegal access, every call to the device fails
                row.setdefault("failed", in_one_line(error))
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
