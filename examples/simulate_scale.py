"""What labelling a million or a billion pictures takes: a seeded simulation of workers that are slow, die and return.

    python examples/simulate_scale.py

It prints the table of docs/scale.md. The costs of a picture in it are measured, by tests/benchmarks/bench_scale.py; how
often machines are lost and how slow the slow ones are is assumed, and can be changed in `Plan`. What is simulated is
what `gdino label` does: shards that are done whole or not at all, by workers that take them from a queue (`--workers`,
`--ray`) or by ranks that each have their share (`accelerate launch`), where all start again when one is lost.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, replace

import numpy as np

HOUR = 3600.0


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        pictures: Number of pictures.
        workers: Number of workers at a time.
        shard: Pictures in a shard.
        seconds: Seconds of a picture on a worker: gdino-nano on one core of an AMD EPYC (Zen 3).
        ranks: Whether each worker has its share from the start, instead of taking shards from a queue.
        start: Seconds from the start of a machine to the first picture, the model loaded.
        write: Seconds to write a shard.
        spread: Standard deviation of the logarithm of a shard's time.
        lost_each_hour: Expected number of times that a worker is lost in an hour, as spot machines are.
        notice: Seconds until the loss of a worker is noticed, and its shard handed to another.
        replace_after: Seconds until a new machine takes the place of a lost one.
        slow_share, slow_factor: Part of the workers that are slow, and how many times as long they take.
        failed_reads: Part of the reads from the object store that fail once and are repeated.
        pause: Seconds before such a read is repeated.
        requests: Requests to the object store of a picture that is read: HEAD and GET.
        listed: Names that one request lists.
    """

    pictures: int
    workers: int
    shard: int = 200
    seconds: float = 0.086
    ranks: bool = False
    start: float = 30.0
    write: float = 0.05
    spread: float = 0.1
    lost_each_hour: float = 0.05
    notice: float = 10.0
    replace_after: float = 180.0
    slow_share: float = 0.02
    slow_factor: float = 2.0
    failed_reads: float = 0.001
    pause: float = 0.5
    requests: float = 2.0
    listed: int = 1000

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.pictures // self.shard)


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        hours: Hours from its start to its last shard; infinite if it does not get on.
        paid: Worker-hours that are paid for.
        lost: Number of workers that were lost.
        redone: Part of the paid time that went into shards that were lost and done again.
        reads, writes, lists: Requests to the object store.
    """

    hours: float
    paid: float
    lost: int
    redone: float
    reads: int
    writes: int
    lists: int

    def money(self, worker_hour: float, thousand_reads: float, thousand_writes: float) -> float:
        """Return what it costs by the prices of a worker's hour and of a thousand requests."""
        requests = self.reads * thousand_reads + (self.writes + self.lists) * thousand_writes
        return self.paid * worker_hour + requests / 1000


def simulate(plan: Plan, seed: int = 0) -> Outcome:
    """Run a plan; equal seeds give equal outcomes."""
    chance = np.random.default_rng(seed)
    slow = chance.random(plan.workers) < plan.slow_share
    pace = np.where(slow, plan.slow_factor, 1.0)
    hours, lost, done_pictures, wasted = (_ranks if plan.ranks else _queue)(plan, pace, chance)
    paid = plan.workers * hours
    failed = int(chance.binomial(min(done_pictures, 10**9), plan.failed_reads))
    return Outcome(
        hours,
        paid,
        lost,
        wasted / HOUR / paid if math.isfinite(paid) else 1.0,
        int(done_pictures * plan.requests) + failed,
        plan.shards,
        -(-plan.pictures // plan.listed),
    )


class _Times:
    """Draws the seconds of shards and the moments of losses, many at a time."""

    def __init__(self, plan: Plan, chance: np.random.Generator) -> None:
        self._plan, self._chance = plan, chance
        self._drawn: list[float] = []

    def of_shard(self, pace: float) -> float:
        plan = self._plan
        if not self._drawn:
            # A logarithmic normal distribution whose mean is 1.
            factors = self._chance.lognormal(-(plan.spread**2) / 2, plan.spread, 4096)
            repeats = self._chance.binomial(plan.shard, plan.failed_reads, 4096) * plan.pause
            self._drawn = (plan.shard * plan.seconds * factors + repeats).tolist()
        return pace * self._drawn.pop() + plan.write

    def until_loss(self) -> float:
        rate = self._plan.lost_each_hour
        return float(self._chance.exponential(HOUR / rate)) if rate else math.inf


def _queue(plan: Plan, pace: np.ndarray, chance: np.random.Generator) -> tuple[float, int, int, float]:
    """Workers take shards from a queue; the shard of a lost one goes back to it.

    Returns:
        Hours, workers lost, pictures read, and seconds of work that was lost.
    """
    times = _Times(plan, chance)
    waiting, lost, read, wasted, end = plan.shards, 0, 0, 0.0, 0.0
    dies = [times.until_loss() for _ in range(plan.workers)]
    # (time, order, what, worker): a worker is ready, or a lost shard is noticed.
    events: list[tuple[float, int, str, int]] = [
        (plan.start, number, "ready", number) for number in range(plan.workers)
    ]
    heapq.heapify(events)
    order, unfinished, idle = plan.workers, plan.shards, []
    while unfinished:
        now, _, what, worker = heapq.heappop(events)
        if what == "noticed":
            waiting += 1
            idle, ready = [], idle
        elif what == "finished":
            unfinished, end, ready = unfinished - 1, now, [worker]
        else:
            ready = [worker]
        for each in ready:
            if dies[each] <= now:
                # It was lost while it was idle or starting.
                lost, back = lost + 1, dies[each] + plan.replace_after + plan.start
                dies[each] = back + times.until_loss()
                heapq.heappush(events, (max(now, back), order, "ready", each))
            elif not waiting:
                idle.append(each)
                continue
            else:
                waiting -= 1
                read += plan.shard
                until = now + times.of_shard(float(pace[each]))
                if until <= dies[each]:
                    heapq.heappush(events, (until, order, "finished", each))
                else:
                    lost, wasted = lost + 1, wasted + dies[each] - now
                    heapq.heappush(events, (dies[each] + plan.notice, order, "noticed", each))
                    order, back = order + 1, dies[each] + plan.replace_after + plan.start
                    dies[each] = back + times.until_loss()
                    heapq.heappush(events, (back, order, "ready", each))
            order += 1
    return end / HOUR, lost, read, wasted


def _ranks(plan: Plan, pace: np.ndarray, chance: np.random.Generator) -> tuple[float, int, int, float]:
    """Each rank has every n-th shard; when one is lost, the launcher ends all, and all start again where they were.

    Returns:
        As `_queue`.
    """
    times = _Times(plan, chance)
    left = np.full(plan.workers, plan.shards // plan.workers)
    left[: plan.shards % plan.workers] += 1
    each = pace * (plan.shard * plan.seconds + plan.write)
    now, lost, wasted, read = 0.0, 0, 0.0, 0
    while True:
        need = plan.start + float((left * each).max())
        until = min(times.until_loss() / plan.workers, need)
        done = np.minimum(left, np.floor(np.maximum(0.0, until - plan.start) / each)).astype(int)
        now += until
        if until == need:
            return (now / HOUR, lost, read + int(left.sum()) * plan.shard, wasted)
        at_work = (left > done) & (until > plan.start)
        wasted += float(((until - plan.start) - done * each)[at_work].sum())
        read += int(done.sum() + at_work.sum()) * plan.shard
        left, lost, now = left - done, lost + 1, now + plan.replace_after
        if lost > 100_000:
            return (math.inf, lost, read, wasted)


MILLION = Plan(1_000_000, workers=16)
# A billion pictures are a hundred runs of ten million, one after the other: each lists and finishes its own part.
PART = Plan(10_000_000, workers=1000, shard=1000)
PLANS = {
    "10^6, 2 cores, no losses": (replace(MILLION, workers=2, lost_each_hour=0.0, slow_share=0.0), 1),
    "10^6, 16 cores, queue": (MILLION, 1),
    "10^6, 16 cores, ranks": (replace(MILLION, ranks=True), 1),
    "10^6, 64 cores, queue": (replace(MILLION, workers=64), 1),
    "10^6, 64 cores, ranks": (replace(MILLION, workers=64, ranks=True), 1),
    "10^6, 64 cores, queue, shards of 5,000": (replace(MILLION, workers=64, shard=5000), 1),
    "10^9, 1,000 cores, queue, shards of 200": (replace(PART, shard=200), 100),
    "10^9, 1,000 cores, queue, shards of 1,000": (PART, 100),
    "10^9, 1,000 cores, queue, shards of 5,000": (replace(PART, shard=5000), 100),
}
"""Plans of the table, each with how many times it runs."""

HEADER = (
    "| plan | hours | worker-hours | workers lost | redone | reads | shards | lists |",
    "|---|---|---|---|---|---|---|---|",
)


def line(name: str, plan: Plan, times: int) -> str:
    """Return a plan's line of the table; of several runs the first is simulated and multiplied."""
    made = simulate(plan)
    counts = (made.lost, made.reads, made.writes, made.lists)
    lost, reads, writes, lists = (f"{times * count:,}" for count in counts)
    hours = f"{times * made.hours:.1f}"
    return (
        f"| {name} | {hours} | {times * made.paid:,.0f} | {lost} | {made.redone:.2%} | {reads} | {writes} | {lists} |"
    )


def table() -> list[str]:
    """Return the lines of the table of docs/scale.md."""
    return [*HEADER, *(line(name, plan, times) for name, (plan, times) in PLANS.items())]


if __name__ == "__main__":
    print("\n".join(table()))
