"""Recording with CUDA graphs (torch.cuda.CUDAGraph)."""

from typing import Any

import torch
from torch import Tensor

from .graph_cache import Computation, Tensors

# The first run on a stream sets up libraries and compiles kernels, which a graph cannot record.
_WARM_UP_RUNS = 2


class CudaRecorder:
    """Records computations as CUDA graphs that share one pool of memory.

    A graph reads its inputs and writes its results at fixed addresses. So a replay copies the inputs in and the results
    out. All of it goes to the caller's current stream, after the replays before it, whichever streams those ran on.
    """

    device_type = "cuda"

    def __init__(self) -> None:
        self._pool: Any = None
        self._done: dict[torch.device, Any] = {}

    def is_recording(self) -> bool:
        """Return whether the current stream is being captured into a graph."""
        return torch.cuda.is_current_stream_capturing()

    def record(self, compute: Computation, inputs: Tensors) -> Computation:
        """Record a computation on CUDA tensors; see `Recorder.record`."""
        device = next(iter(inputs.values())).device
        # Tensors made in inference mode could not be written to outside of it.
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            fixed = {name: x.clone() for name, x in inputs.items()}
            stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_RUNS):
                    compute(fixed)
            current.wait_stream(stream)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # "thread_local": other threads may go on allocating memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                results = compute(fixed)
            done = self._done.setdefault(device, torch.cuda.Event())

        def replay(given: Tensors) -> Tensors:
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream(device)
                stream.wait_event(done)
                for name, x in given.items():
                    fixed[name].copy_(x)
                graph.replay()
                copies: dict[str, Tensor] = {name: x.clone() for name, x in results.items()}
                done.record(stream)
            return copies

        # Besides weights, a computation may read tensors that it refers to, which must live as long as the graph.
        replay.__dict__["compute"] = compute
        return replay
