"""Work that the device repeats without the host queueing its kernels again."""

import contextlib
import functools
from collections.abc import Callable

import torch

__all__ = ["DeviceGraph", "GraphPool", "obstacle"]


def obstacle(dtype: torch.dtype) -> str | None:
    """Why a pass with experts of `dtype` cannot be recorded on this machine, or None when it can."""
    if not torch.cuda.is_available():
        return "graphs need a CUDA device"
    if dtype != torch.bfloat16 or torch.cuda.get_device_capability() < (9, 0):
        # A recording that fails leaves torch's random number generator of the device unusable: better not begun.
        return "torch's grouped products wait for the host, except in bf16 on compute capability 9.0 or newer"
    return None


class GraphPool:
    """Memory that graphs which never run at the same time share."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()


class DeviceGraph:
    """What `call` queues on the current CUDA device, recorded without running it.

    `call` must not wait for the device, and whatever it needs set up once (compiled kernels, workspaces) must be set up already.
    It reads its inputs from tensors that stay where they are; the tensors it returns are overwritten by every replay.
    Raises RuntimeError where something in it cannot be recorded; nothing has then been run.
    """

    def __init__(self, call: Callable[[], torch.Tensor | None], pool: GraphPool) -> None:
        self._graph = torch.cuda.CUDAGraph()
        stream = _recording_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # thread_local: other threads (NCCL's watchdog) may go on using the device.
            self._graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
            try:
                self._result = call()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self) -> torch.Tensor | None:
        """Queues the work; the tensor that `call` returned then holds the new result."""
        self._graph.replay()
        return self._result


@functools.cache
def _recording_stream() -> torch.cuda.Stream:
    """One for the process: cuBLAS keeps a workspace for every stream it has seen."""
    return torch.cuda.Stream()
