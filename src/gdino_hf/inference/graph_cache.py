"""A bounded number of recorded computations, one per combination of input shapes, each replayed when its shapes recur.

Launching the thousand small kernels of a forward pass one by one takes longer than a GPU needs to run them. A recording
launches them all at once, but it is valid for one combination of shapes only, and pictures differ in shape. So shapes
are recorded when they have come often enough, up to a limit. Everything else runs as usual, one operation at a time
("eagerly"), and so does everything after a recording has failed.

How to record is left to a `Recorder`; this file is the same for every device.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .watched_modules import WatchedModules

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
Computation = Callable[[Tensors], Tensors]

MOST = 16
"""Recordings per model. An image size takes one for the backbone and one more per length of prompt, in steps of 16."""

EAGER_CALLS = 2
"""Number of calls with the same shapes that run eagerly before one is recorded, which takes as long as several."""

_REMEMBERED = 1000


class Recorder(Protocol):
    """What a `GraphCache` needs to know about a device."""

    device_type: str
    """torch's name of the device."""

    def record(self, compute: Computation, inputs: Tensors) -> Computation:
        """Record a computation.

        Args:
            compute: A function of tensors by name that depends on their shapes and values only.
            inputs: Tensors to record with.

        Returns:
            A function that replays the computation on other tensors of the same shapes, dtypes and devices. What it
            returns is the caller's own: the next replay does not write to it.

        Raises:
            Exception: The computation cannot be recorded.
        """

    def is_recording(self) -> bool:
        """Return whether a recording of someone else is going on, into which the operations have to go."""


@dataclass(frozen=True)
class _Recording:
    replay: Computation
    watched: WatchedModules


class GraphCache:
    """Recordings of a model's computations; safe to share between threads.

    Args:
        recorder: Records computations on one kind of device.
        most: Largest number of recordings.
        eager_calls: Number of calls with the same shapes before a recording is made.
    """

    def __init__(self, recorder: Recorder, most: int = MOST, eager_calls: int = EAGER_CALLS) -> None:
        self.recorder, self.most, self.eager_calls = recorder, most, eager_calls
        self._recordings: dict[Hashable, _Recording] = {}
        self._calls: OrderedDict[Hashable, int] = OrderedDict()
        self._failed = self._full = False
        # Recordings share their memory, so no two may run at once.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Return the number of recordings."""
        return len(self._recordings)

    def __bool__(self) -> bool:
        return True

    def run(
        self,
        name: str,
        compute: Computation,
        inputs: Tensors,
        modules: Callable[[], Iterable[nn.Module]],
        settings: Hashable = (),
    ) -> Tensors:
        """Replay a computation if there is a recording for these shapes, otherwise compute.

        Args:
            name: Name of the computation.
            compute: The computation, a function of tensors by name. Nothing but `inputs`, `settings` and the weights of
                `modules` may influence its result.
            inputs: Its input tensors.
            modules: Function that lists the modules whose weights it reads, each module by itself.
            settings: Whatever else decides which operations run.

        Returns:
            The computation's results, which the caller owns.
        """
        if not self._may_record(inputs):
            return compute(inputs)
        key = name, settings, tuple((label, x.shape, x.dtype, x.device) for label, x in inputs.items())
        with self._lock:
            recording = self._recordings.get(key) or self._record(key, compute, inputs, modules)
            if recording is not None and recording.watched.changed():
                self.clear()
            elif recording is not None and not recording.watched.intercepted():
                return recording.replay(inputs)
        return compute(inputs)

    def clear(self) -> None:
        """Forget all recordings and free their memory."""
        with self._lock:
            self._recordings.clear()
            self._calls.clear()

    def _may_record(self, inputs: Tensors) -> bool:
        tensors = list(inputs.values())
        device = tensors[0].device
        if self._recordings and device.type != self.recorder.device_type:
            self.clear()  # the model has left the device
        return (
            not self._failed
            and device.type == self.recorder.device_type
            and all(type(x) is Tensor and x.device == device for x in tensors)
            and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
            and not torch.is_autocast_enabled(device.type)
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not self.recorder.is_recording()
        )

    def _record(
        self, key: Hashable, compute: Computation, inputs: Tensors, modules: Callable[[], Iterable[nn.Module]]
    ) -> _Recording | None:
        """Make a recording if these shapes have come often enough, and there is room; None if not."""
        calls = self._calls.pop(key, 0)
        self._calls[key] = calls + 1
        if len(self._calls) > _REMEMBERED:
            self._calls.popitem(last=False)
        if calls < self.eager_calls:
            return None
        if len(self._recordings) >= self.most:
            if not self._full:
                logger.warning(
                    "All %d recordings of this model are in use: other sizes run without, which "
                    "is slower. Resize the images to fewer sizes to avoid it.",
                    self.most,
                )
            self._full = True
            return None
        watched = WatchedModules(modules())
        if watched.intercepted():
            return None
        try:
            recording = _Recording(self.recorder.record(compute, inputs), watched)
        except Exception as error:  # whatever a driver or a third party's kernel raises, the model must stay usable
            self._failed = True
            self.clear()
            reason = str(error).strip().splitlines() or [""]
            logger.warning(
                "A forward pass cannot be recorded, so this model runs one operation at a time: %s: %s",
                type(error).__name__,
                reason[0],
            )
            return None
        self._recordings[key] = recording
        return recording

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy or pickle without the recordings, which belong to one model in one process."""
        return GraphCache, (type(self.recorder)(), self.most, self.eager_calls)
