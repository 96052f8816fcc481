"""Work beside the main queue of the device."""

import contextlib
import functools
from collections.abc import Iterator

import torch

from megatron_m1.platform import is_cuda

__all__ = ["SideStream", "side_stream"]


class SideStream:
    """A second queue on the device: `fork`, then any number of `queue` blocks, then `join`. On CPU all of it is the main queue."""

    def __init__(self) -> None:
        self._stream = side_stream() if is_cuda() else None

    def fork(self, *inputs: torch.Tensor) -> None:
        """What is queued from now on starts when the main queue has done its work up to here; it may read `inputs`."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            for tensor in inputs:
                tensor.record_stream(self._stream)

    @contextlib.contextmanager
    def queue(self) -> Iterator[None]:
        """Work in this block goes to the side queue."""
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield

    def join(self, *outputs: torch.Tensor) -> None:
        """The main queue waits for the side queue; it may read `outputs`."""
        if self._stream is not None:
            main = torch.cuda.current_stream()
            main.wait_stream(self._stream)
            for tensor in outputs:
                tensor.record_stream(main)


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """One for the process: work that goes beside the main queue keeps its own order. What others wait for goes first: high priority."""
    return torch.cuda.Stream(priority=-1)
