"""When to stop early: a signal or a time limit, agreed among the ranks."""

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

__all__ = ["EarlyStop"]


class EarlyStop:
    """`reason()` says on every rank alike why the run should save and end, or None. SIGTERM and SIGUSR1 (what Slurm is asked
    to send before its time limit) on any one rank are enough."""

    def __init__(self, *, exit_after_s: float | None, device: torch.device) -> None:
        self.deadline = None if exit_after_s is None else time.monotonic() + exit_after_s
        self.device = device
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def reason(self) -> str | None:
        """One all-reduce of two integers; call once a step on every rank."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        state = torch.tensor([self.signal, int(late)], device=self.device)
        dist.all_reduce(state, op=dist.ReduceOp.MAX)
        number, late_anywhere = state.tolist()
        if number:
            return signal.Signals(number).name
        return "training.exit_after_s" if late_anywhere else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
