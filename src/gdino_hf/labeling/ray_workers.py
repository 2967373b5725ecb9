"""Shards labelled by the machines of a Ray cluster; this process hands them out and writes what comes back.

A shard is a Ray task whose result is the shard's file, so no machine of the cluster needs to see the folder of results,
and a task that Ray repeats after it lost a process or a machine gives the same bytes. Processes keep their model from
one task to the next. Tasks that wait for room are what makes an autoscaling cluster grow.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..detection.exchange_values import kept_library
from ..error_text import reason
from ..model.printable import printable
from .death_blame import MOST_DEATHS
from .label_store import LabelStore
from .label_workers import NextShard, NoShard, Shard, ShardMaker, ShardOrder, Tally, WorkerError

# Seconds between two looks at the plan and the progress.
_PATIENCE = 0.2
# Seconds between two looks at how many tasks the cluster has room for.
_ROOM_SECONDS = 2.0
# Environment variables of this package, which decide about limits of pictures and backends.
_OWN_VARIABLES = "GDINO_"
RAY_NEED = "Working on a cluster needs"


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster and what each task on it takes.

    Attributes:
        address: "auto" for the cluster that this machine is part of, or the cluster's HOST:PORT or ray:// address.
        workers: Most shards that are labelled at a time; None for as many as the cluster has room for, and one more, so
            that a cluster that can grow does.
        cpus: Cores of a task; its model computes in as many threads.
        gpus: GPUs of a task, such as 0.5 for two tasks on each; None for 1 if the cluster has any and the device is not
            "cpu", and else 0.
    """

    address: str = "auto"
    workers: int | None = None
    cpus: int = 1
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.cpus < 1 or (self.workers is not None and self.workers < 1):
            raise ValueError(f"cpus is {self.cpus} and workers is {self.workers}; give at least 1.")
        if self.gpus is not None and self.gpus < 0:
            raise ValueError(f"gpus is {self.gpus}; give 0 or more.")


@contextmanager
def connected(cluster: RayCluster) -> Iterator[None]:
    """Connect this process to a cluster during the `with` block; a connection that is there already is used and kept.

    Raises:
        ImportError: Ray is not installed.
        ValueError: There is no cluster at the address.
    """
    ray = kept_library("ray", RAY_NEED, "ray")
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(cluster.address, log_to_driver=False, logging_level="error")
    except Exception as error:  # of many types: gRPC's, Ray's, the resolver's
        raise ValueError(
            f"There is no Ray cluster at {printable(cluster.address)} ({reason(error, most_lines=1)}); start one with "
            "`ray start --head`, or give its address."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


class RayPool:
    """Labels shards on a cluster that this process is connected to.

    Args:
        order: What the tasks are told.
        store: Files of the run.
        cluster: The cluster.
        say: Function that is called with a line for the user.
    """

    def __init__(self, order: ShardOrder, store: LabelStore, cluster: RayCluster, say: Callable[[str], None]) -> None:
        import ray

        # With a GPU of its choice, Ray lets a task see no other.
        order = order.on("cuda") if order.device.startswith("cuda") else order
        self._ray, self._order, self._store, self._say, self._cluster = ray, order, store, say, cluster
        self._gpus = gpus_of_task(order.device, cluster.gpus)
        self._settings = ray.put(TaskSettings(order, cluster.cpus, own_variables()))
        # GPU tasks would get a new process, and load the model again, each time.
        self._task = ray.remote(num_cpus=cluster.cpus, num_gpus=self._gpus, max_calls=0)(label_shard)
        self._room, self._looked_at, self._waits = 1, float("-inf"), False

    def run(self, next_shard: NextShard, tell: Callable[[Tally], None]) -> None:
        """Label all shards.

        Args:
            next_shard: Where shards come from.
            tell: Function that is called with what was done, every moment or so also with nothing.

        Raises:
            OSError: A shard cannot be written.
            WorkerError: A model cannot be loaded, or the cluster is lost.
        """
        at_work: dict[Any, tuple[Shard, Collection[int]]] = {}
        exhausted = False
        try:
            while not exhausted or at_work:
                while not exhausted and len(at_work) < self._most():
                    shard = next_shard()
                    exhausted = shard is NoShard.MORE
                    if not isinstance(shard, Shard):
                        break
                    at_work[self._start(shard.items)] = (shard, ())
                for task in self._wait(at_work):
                    shard, left_out = at_work.pop(task)
                    content = self._result(task)
                    if content is None:
                        left_out = self._suspects(shard, left_out, tell)
                        at_work[self._start(shard.items, left_out)] = (shard, left_out)
                        continue
                    self._store.write(self._order.name(shard.number), content)
                    tell(self._order.tally(content))
                tell(Tally())
        except (self._ray.exceptions.RayError, ConnectionError) as error:
            raise WorkerError(
                f"the cluster cannot go on ({reason(error, most_lines=1)}); repeat the command, which goes on where it "
                "stopped."
            ) from error
        finally:
            for task in at_work:
                self._ray.cancel(task)

    def _start(self, items: Sequence[Any], left_out: Collection[int] = (), retries: int = MOST_DEATHS - 1) -> Any:
        return self._task.options(max_retries=retries).remote(self._settings, items, tuple(left_out))

    def _wait(self, tasks: Collection[Any]) -> list[Any]:
        """Return the tasks that are done, after a moment if there are none."""
        if not tasks:
            time.sleep(_PATIENCE)
            return []
        done, _ = self._ray.wait(list(tasks), timeout=_PATIENCE)
        return list(done)

    def _result(self, task: Any) -> bytes | None:
        """Return a shard's file; None if processes or machines that worked on it were lost, as often as Ray repeats it.

        Raises:
            WorkerError: It cannot be made.
        """
        try:
            content: bytes | str = self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            raise WorkerError(f"a task on the cluster failed ({reason(error.cause)}).") from error
        except (
            self._ray.exceptions.WorkerCrashedError,
            self._ray.exceptions.NodeDiedError,
            self._ray.exceptions.OutOfMemoryError,
            self._ray.exceptions.ObjectLostError,
        ):
            return None
        if isinstance(content, str):
            raise WorkerError(content)
        return content

    def _suspects(self, shard: Shard, left_out: Collection[int], tell: Callable[[Tally], None]) -> Collection[int]:
        """Return the places of a shard's pictures that processes die of: each is labelled alone to find out."""
        number = len(shard.items)
        if left_out:
            # It was lost again without them.
            return tuple(range(number))
        self._say(f"a shard of {number} pictures was lost {MOST_DEATHS} times; each of them is looked at alone")
        alone = {self._start([item], retries=MOST_DEATHS - 1): place for place, item in enumerate(shard.items)}
        waiting, suspects = set(alone), []
        while waiting:
            for task in self._wait(waiting):
                waiting.discard(task)
                if self._result(task) is None:
                    suspects.append(alone[task])
            tell(Tally())
        self._say(f"{len(suspects)} pictures are left out, because worker processes died of them {MOST_DEATHS} times")
        return tuple(sorted(suspects))

    def _most(self) -> int:
        """Return how many tasks may be under way."""
        now = time.monotonic()
        if now - self._looked_at >= _ROOM_SECONDS:
            self._looked_at, room = now, sum(map(self._room_on, self._ray.nodes()))
            if room == 0 and not self._waits:
                takes = f"{self._cluster.cpus} CPUs" + (f" and {self._gpus:g} GPUs" if self._gpus else "")
                self._say(f"no machine of the cluster has {takes}, which a worker takes; waiting for one")
            self._room, self._waits = room, room == 0
        return self._cluster.workers or self._room + 1

    def _room_on(self, node: Mapping[str, Any]) -> int:
        """Return how many tasks a machine has room for."""
        if not node["Alive"]:
            return 0
        has = node["Resources"]
        room = int(has.get("CPU", 0) / self._cluster.cpus)
        return min(room, int(has.get("GPU", 0) / self._gpus)) if self._gpus else room


@dataclass(frozen=True)
class TaskSettings:
    """What all tasks of a run share.

    Attributes:
        order: What shards are made of.
        threads: Threads that the model computes in.
        variables: Environment variables of this package.
    """

    order: ShardOrder
    threads: int
    variables: Mapping[str, str]


def label_shard(settings: TaskSettings, items: Sequence[Any], left_out: Collection[int]) -> bytes | str:
    """Make a shard, in a process of a cluster.

    Args:
        settings: What all tasks share.
        items: The pictures.
        left_out: Places of pictures that are not touched, because processes died of them.

    Returns:
        The shard's file, or the sentence that tells why no shard can be made in this process.
    """
    try:
        maker = _maker(settings)
    except Exception as error:
        return f"a worker on {_machine()} cannot load the model ({reason(error)})."
    try:
        return maker.content(items, None, left_out)
    except Exception as error:
        # The device is lost to this process. Ray repeats the task in another one.
        print(f"the model cannot go on ({reason(error)})", flush=True)
        os._exit(1)


# The model of this process, and the order it was loaded for.
_loaded: list[tuple[str, ShardMaker]] = []


def _maker(settings: TaskSettings) -> ShardMaker:
    """Return the model, which is loaded for the first task of a process.

    Raises:
        ImportError: A library is not installed on this machine.
        OSError: The model cannot be read.
        ValueError: It cannot be used, or this machine has another one.
    """
    if _loaded and _loaded[0][0] == settings.order.key:
        return _loaded[0][1]
    _loaded.clear()
    adopt_variables(settings.variables)
    maker = settings.order.maker(settings.threads)
    _loaded.append((settings.order.key, maker))
    return maker


def gpus_of_task(device: str, gpus: float | None) -> float:
    """Return the GPUs of a task: those asked for, or 1 if the cluster has any and the model may use it."""
    import ray

    if gpus is not None:
        return gpus
    return 1 if device != "cpu" and ray.cluster_resources().get("GPU") else 0


def own_variables() -> dict[str, str]:
    """Return the environment variables of this package."""
    return {name: value for name, value in os.environ.items() if name.startswith(_OWN_VARIABLES)}


def adopt_variables(variables: Mapping[str, str]) -> None:
    """Set the environment variables of this package to those of another process."""
    for name in own_variables().keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


def _machine() -> str:
    import platform

    return printable(platform.node() or "a machine")
