"""When to stop early: a signal or a time limit, agreed among the ranks."""

import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["EarlyStop"]


class EarlyStop:
    """`reason()` says on every rank alike why the run should save and end, or None. Within the `with` block SIGTERM and SIGUSR1
    (what Slurm is asked to send before its time limit) are noted; one on any rank is enough."""

    def __init__(self, *, exit_after_s: float | None, device: torch.device) -> None:
        self.deadline = None if exit_after_s is None else time.monotonic() + exit_after_s
        self.device = device
        self.signal = 0
        self.previous: dict[int, Any] = {}

    def reason(self, group: dist.ProcessGroup | None = None) -> str | None:
        """One all-reduce of two integers, over `group` (None: the world), on all of whose ranks it is to be called."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        state = torch.tensor([self.signal, int(late)], device=self.device)
        dist.all_reduce(state, op=dist.ReduceOp.MAX, group=group)
        number, late_anywhere = state.tolist()
        if number:
            return signal.Signals(number).name
        return "training.exit_after_s" if late_anywhere else None

    def __enter__(self) -> "EarlyStop":
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
